"""Find or fetch the base policy and write its manifest: folder, revision, digest of every file.

python -m workflow_scripts.prepare_base_policy --manifest results/policies/base/manifest.json \
    --config '{"source": "bundled", "bundled": "models/tiny-qwen2.5-vl", "hub": null}'
"""

from pathlib import Path

import huggingface_hub
from filelock import FileLock

from workflow_scripts.command_line import Input, Output, StageArguments
from workflow_scripts.policy.manifest import NEEDED, model_files
from workflow_scripts.provenance import ROOT, write_json
from workflow_scripts.stage_configuration import PrepareBasePolicy
from workflow_scripts.tracking import run_stage


class Arguments(StageArguments):
    """Find or fetch the base policy and write its manifest."""

    cold_start: Input | None = None
    """Weights made by the cold start, for `source: cold_start`."""
    manifest: Output
    """Manifest of the base policy."""
    config: PrepareBasePolicy
    """Configuration of this stage as JSON."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config = arguments.config
    with run_stage(arguments) as run:
        revision = None
        if config.hub:
            with FileLock(arguments.manifest.with_suffix(".lock")):
                revision = huggingface_hub.HfApi().model_info(config.hub.repository, revision=config.hub.revision).sha
                folder = Path(
                    huggingface_hub.snapshot_download(
                        config.hub.repository, revision=revision, allow_patterns=list(NEEDED)
                    )
                )
        elif arguments.cold_start:
            folder = arguments.cold_start.parent.resolve()
        else:
            folder = ROOT / str(config.bundled)
        files = model_files(folder)
        inside = folder.is_relative_to(ROOT)
        write_json(
            arguments.manifest,
            {
                "source": config.source,
                "repository": config.hub.repository if config.hub else None,
                "revision": revision,
                "path": str(folder.relative_to(ROOT) if inside else folder),
                "files": files,
            },
        )
        run.metrics({"megabytes": sum((folder / name).stat().st_size for name in files) / 1e6})


if __name__ == "__main__":
    main()
