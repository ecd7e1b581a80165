"""Read the published annotations of a split into the canonical table; no image is read.

python -m workflow_scripts.read_annotations --record results/downloads/imagereward/dataset.json \
    --output results/datasets/imagereward/test/preferences.parquet \
    --config '{"dataset": "imagereward", "split": "test"}'
"""

import json

import pyarrow.parquet as pq

from workflow_scripts.command_line import Input, Output, StageArguments
from workflow_scripts.preferences import hpdv2, imagereward, own_data
from workflow_scripts.preferences.schema import write_preferences
from workflow_scripts.preferences.subsampling import normalised
from workflow_scripts.provenance import ROOT, check_file
from workflow_scripts.stage_configuration import ReadAnnotations
from workflow_scripts.tracking import run_stage


class Arguments(StageArguments):
    """Read the published annotations of a split into the canonical table."""

    record: Input
    """dataset.json of the data set; the raw files stand beside it."""
    output: Output
    """preferences.parquet: one row for each prompt."""
    config: ReadAnnotations
    """Which data set and split."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    with run_stage(arguments) as run:
        folder, split = arguments.record.parent, arguments.config.split
        record = json.loads(arguments.record.read_text(encoding="utf-8"))
        files = record["files"]
        if arguments.config.dataset == "imagereward":
            name, rows = (imagereward.annotation_file(split), imagereward.read_preferences(folder, split, files))
        elif arguments.config.dataset == "own":
            folder, name = ROOT / record["folder"], record["annotations"]
            rows = own_data.read_preferences(folder, name, split, record["splits"])
        else:
            name, rows = (hpdv2.annotation_file(split), hpdv2.read_preferences(folder, split))
        check = own_data.check_unchanged if arguments.config.dataset == "own" else check_file
        check(folder / name, files[name], arguments.record)
        counts = write_preferences(arguments.output, rows)
        texts = pq.read_table(arguments.output, columns=["prompt"])["prompt"].to_pylist()
        run.metrics({**counts, "duplicate_texts": len(texts) - len({normalised(text) for text in texts})})


if __name__ == "__main__":
    main()
