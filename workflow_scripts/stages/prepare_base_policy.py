"""Find or fetch the base policy and write its manifest: folder, revision, digest of every file.

A published adapter on it is found or fetched likewise.

python -m workflow_scripts.stages.prepare_base_policy --manifest results/policies/base/manifest.json \
    --config '{"source": "bundled", "bundled": "models/tiny-qwen2.5-vl", "hub": null}'
"""

from pathlib import Path
from typing import Any

from workflow_scripts.configuration.model import PolicyAdapter, PolicyHub
from workflow_scripts.configuration.stages import PrepareBasePolicy
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.writing import write_json
from workflow_scripts.policy.manifest import ADAPTER, ADAPTER_CONFIG, NEEDED, model_records
from workflow_scripts.policy.published_adapter import adapter_files
from workflow_scripts.preferences.hub import fetch
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Find or fetch the base policy and write its manifest."""

    cold_start: Input | None = None
    """Weights from the cold start, for `source: cold_start`."""
    manifest: Output
    """Manifest of the base policy."""
    config: PrepareBasePolicy
    """Configuration of this stage as JSON."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config = arguments.config
    with run_stage(arguments) as run:
        repository = revision = known = None
        if config.hub:
            folder, repository, revision, known = located(config.hub, list(NEEDED), config, "policy.hub")
        elif arguments.cold_start:
            folder = arguments.cold_start.parent.resolve()
        else:
            folder = ROOT / str(config.bundled)
        records = model_records(folder, known)
        files = {name: record["sha256"] for name, record in records.items()}
        manifest = {"source": config.source} | recorded(folder, repository, revision, files)
        if config.hub and config.hub.adapter:
            place = config.hub.adapter
            found, name, commit, _ = located(place, [ADAPTER_CONFIG, ADAPTER], config, "policy.hub.adapter")
            bases = (config.hub.repository, repository) if repository else ()
            manifest["adapter"] = recorded(found, name, commit, adapter_files(found, bases))
        write_json(arguments.manifest, manifest)
        run.files_read = records  # size and modification time spare every later job from reading the weights
        run.metrics({"megabytes": sum(record["bytes"] for record in records.values()) / 1e6})


def located(
    place: PolicyHub | PolicyAdapter, names: list[str], config: PrepareBasePolicy, key: str
) -> tuple[Path, str | None, str | None, dict[str, Any] | None]:
    """Folder, repository, commit and file records of a place, fetched from the Hub where it names no folder.

    Args:
        place: section of the configuration.
        names: of the files, or patterns.
        config: of the stage.
        key: the section's, for messages.

    Raises:
        HubError: the Hub does not give the files.
    """
    if place.path:
        return Path(place.path).expanduser().resolve(), None, None, None
    target = Path(str(config.downloads), "hub", place.repository.replace("/", "--")).resolve()
    return fetch("model", place.repository, place.revision, names, target, key)


def recorded(folder: Path, repository: str | None, revision: str | None, files: dict[str, str]) -> dict[str, Any]:
    """What a manifest says of a folder: where it is from, where it is, and its files."""
    path = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    return {"repository": repository, "revision": revision, "path": str(path), "files": files}


if __name__ == "__main__":
    main()
