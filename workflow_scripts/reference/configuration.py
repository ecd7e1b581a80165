"""Files made from the typed configuration, so that there is one source: a test holds them together.

python -m workflow_scripts.reference.configuration    # config.yaml, config.schema.json and docs/configuration.md
"""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from workflow_scripts.configuration.model import Configuration, Section

# Shown as a comment, so that an overlay can set the key that stands in its place without unsetting this one.
REPLACEABLE = "steps"


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key that has a value of its own: dotted name, pydantic field, value."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, value


def _allowed(field: Any) -> str:
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        kind = " or ".join(f"`{choice}`" for choice in get_args(annotation))
    elif get_origin(annotation) is list:
        item = get_args(annotation)[0]
        choices = [a.__name__ if isinstance(a, type) else str(a) for a in (get_args(item) or (item,))]
        kind = f"list of {', '.join(choices)}"
    elif get_origin(annotation) in (Union, UnionType):
        kind = " or ".join("null" if a is NoneType else a.__name__ for a in get_args(annotation))
    else:
        kind = annotation.__name__
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f"{signs[k]} {getattr(m, k)}" for m in field.metadata for k in signs if getattr(m, k, None) is not None]
    return ", ".join([kind, *bounds])


def render_yaml(section: Section, depth: int = 0, seen: set[tuple[type, str]] | None = None) -> str:
    """Commented YAML of the defaults; a kind of section is commented where it first occurs."""
    seen = set() if seen is None else seen
    indent = "  " * depth
    lines = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        inherited = next(c for c in reversed(type(section).__mro__) if name in getattr(c, "model_fields", {}))
        first = (inherited, name) not in seen
        seen.add((inherited, name))
        if isinstance(value, Section):
            text = (type(value).__doc__ or "").splitlines()[0].rstrip(".")
            lines += ["" if depth == 0 else None, f"{indent}# {text}", f"{indent}{name}:"]
            lines.append(render_yaml(value, depth + 1, seen))
            continue
        if first:
            comment = f"{(field.description or '').rstrip('.')} ({_allowed(field).replace('`', '')})"
            lines += textwrap.wrap(comment, 116, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        plain = [v.model_dump() if isinstance(v, Section) else v for v in value] if isinstance(value, list) else value
        dumped = yaml.safe_dump(plain, default_flow_style=True, width=1000, allow_unicode=True)
        entry = f"{name}: {dumped.removesuffix('...' + chr(10)).rstrip()}"
        lines.append(f"{indent}# {entry}" if name == REPLACEABLE else f"{indent}{entry}")
    return "\n".join(line for line in lines if line is not None)


def render_markdown(configuration: Configuration) -> str:
    """Key-by-key reference."""
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for key, field, value in leaves(configuration):
        cell = json.dumps(value) if not isinstance(value, str) else value
        allowed = _allowed(field).replace("|", "\\|")
        meaning = field.description.replace("|", "\\|").replace("\n", " ")
        rows.append(f"| `{key}` | `{cell.replace('|', chr(92) + '|')}` | {allowed} | {meaning} |")
    head = (
        "# Configuration, key by key\n\nMade from `workflow_scripts/configuration/model.py` by "
        "`python -m workflow_scripts.reference.configuration`; a test holds them together.\n\n"
    )
    return head + "\n".join(rows) + "\n"


def generated_files() -> dict[str, str]:
    """Text of every file that is made from this model, by path in the repository."""
    configuration = Configuration()
    head = (
        "# yaml-language-server: $schema=config.schema.json\n"
        "# The embedded default: minutes on two CPU cores, no GPU, no hub, no account. Override single keys with\n"
        "# --config 'scoring={report_k: [1, 2]}' or whole sections with --configfile; see docs/configuration.md.\n"
    )
    return {
        "config.yaml": head + render_yaml(configuration) + "\n",
        "config.schema.json": json.dumps(Configuration.model_json_schema(), indent=2, ensure_ascii=False) + "\n",
        "docs/configuration.md": render_markdown(configuration),
    }


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    for path, text in generated_files().items():
        (root / path).write_text(text, encoding="utf-8")
