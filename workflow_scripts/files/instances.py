"""How stage instances are named, and their settings listed, from what is recorded of them."""

from typing import Any

# The parts of a stage instance's name, in the order in which they are said.
INSTANCE_KEYS = ("dataset", "track", "policy", "test", "split", "seed", "shard", "block")


def instance_name(record: dict[str, Any]) -> str:
    """Name of a stage instance by its sidecar: "train_grpo · imagereward · seed 0"."""
    parts = {key: record["config"][key] for key in INSTANCE_KEYS if key in record["config"]}
    return " · ".join([record["stage"], *(f"{k} {v}" if isinstance(v, int) else str(v) for k, v in parts.items())])


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested sections by dotted key."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }
