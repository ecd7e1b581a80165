"""Record the user's own preference data: the table, every image that it names, and the settings of the splits.

python -m workflow_scripts.stages.record_own_data --record results/own/datasets/own/dataset.json \
    --config '{"folder": "examples/own_data", "annotations": "ratings.csv", "split_seed": 0,
               "validation_fraction": 0.1, "test_fraction": 0.2}'

The files stay in place; every later stage compares the files that it reads with this record.
"""

import os
from pathlib import Path

from workflow_scripts.configuration.data_stages import RecordOwnData
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.records import file_record
from workflow_scripts.files.writing import write_json
from workflow_scripts.preferences.own_data import image_files
from workflow_scripts.running.command_line import Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Record the user's own preference data."""

    record: Output
    """dataset.json: folder, digests of its files, settings of the splits."""
    config: RecordOwnData
    """Folder, table and splits."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config = arguments.config
    with run_stage(arguments) as run:
        folder, absolute = ROOT / config.folder, Path(config.folder).is_absolute()
        images = image_files(folder, config.annotations)
        files = {name: file_record(folder / name) for name in (config.annotations, *images)}
        record = {
            "dataset": "own",
            "source": "own",
            "revision": f"SHA-256 {files[config.annotations]['sha256'][:16]} of {config.annotations}",
            "folder": config.folder if absolute else os.path.relpath(folder, arguments.record.parent),
            "annotations": config.annotations,
            "splits": {
                "seed": config.split_seed,
                "validation_fraction": config.validation_fraction,
                "test_fraction": config.test_fraction,
            },
            "files": files,
        }
        write_json(arguments.record, record)
        run.metrics({"files": len(files), "bytes": sum(record["bytes"] for record in files.values())})


if __name__ == "__main__":
    main()
