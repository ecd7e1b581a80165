"""Find or fetch the base policy and write its manifest: folder, revision, digest of every file.

python -m workflow_scripts.stages.prepare_base_policy --manifest results/policies/base/manifest.json \
    --config '{"source": "bundled", "bundled": "models/tiny-qwen2.5-vl", "hub": null}'
"""

from pathlib import Path

from workflow_scripts.configuration.stages import PrepareBasePolicy
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.writing import write_json
from workflow_scripts.policy.manifest import NEEDED, model_records
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
        if config.hub and config.hub.path:
            folder = Path(config.hub.path).expanduser().resolve()
        elif config.hub:
            target = Path(str(config.downloads), "hub", config.hub.repository.replace("/", "--")).resolve()
            folder, repository, revision, known = fetch(
                "model", config.hub.repository, config.hub.revision, list(NEEDED), target, "policy.hub"
            )
        elif arguments.cold_start:
            folder = arguments.cold_start.parent.resolve()
        else:
            folder = ROOT / str(config.bundled)
        records = model_records(folder, known)
        inside = folder.is_relative_to(ROOT)
        write_json(
            arguments.manifest,
            {
                "source": config.source,
                "repository": repository,
                "revision": revision,
                "path": str(folder.relative_to(ROOT) if inside else folder),
                "files": {name: record["sha256"] for name, record in records.items()},
            },
        )
        run.files_read = records  # size and modification time spare every later job from reading the weights
        run.metrics({"megabytes": sum(record["bytes"] for record in records.values()) / 1e6})


if __name__ == "__main__":
    main()
