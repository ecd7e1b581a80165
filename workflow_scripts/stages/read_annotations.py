"""Read the published annotations of a split into the canonical table; no image is read.

python -m workflow_scripts.stages.read_annotations --record results/downloads/imagereward/dataset.json \
    --output results/datasets/imagereward/test/preferences.parquet \
    --config '{"dataset": "imagereward", "split": "test"}'
"""

import json

import pyarrow.parquet as pq

from workflow_scripts.configuration.published import PUBLISHED, differences
from workflow_scripts.configuration.stages import ReadAnnotations
from workflow_scripts.files.records import checked_raw_file, raw_folder
from workflow_scripts.preferences import hpdv2, imagereward, own_data
from workflow_scripts.preferences.schema import write_preferences
from workflow_scripts.preferences.subsampling import normalised
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Read the published annotations of a split into the canonical table."""

    record: Input
    """dataset.json of the data set; it says where the raw files are."""
    output: Output
    """preferences.parquet: one row for each prompt."""
    config: ReadAnnotations
    """Which data set and split."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    with run_stage(arguments) as run:
        dataset, split = arguments.config.dataset, arguments.config.split
        record = json.loads(arguments.record.read_text(encoding="utf-8"))
        files, folder = record["files"], raw_folder(record, arguments.record)
        if dataset == "imagereward":
            name, rows = imagereward.annotation_file(split), imagereward.read_preferences(folder, split, files)
        elif dataset == "own":
            name = record["annotations"]
            rows = own_data.read_preferences(folder, name, split, record["splits"])
        else:
            name, rows = hpdv2.annotation_file(split), hpdv2.read_preferences(folder, split)
        checked_raw_file(name, record, arguments.record)
        counts = write_preferences(arguments.output, rows)
        if record["source"] == "hub":
            part = f"{split}-{record['train_set']}" if split == "train" and record["train_set"] else split
            pairs = counts["given_pairs"] + counts["strict_pairs"] + counts["tied_pairs"]
            read = {"prompts": counts["prompts"], "images": counts["images"], "pairs": pairs}
            if other := differences(dataset, part, read):
                run.warn(
                    f"{dataset}, {part}: read {'; '.join(other)} ({PUBLISHED[dataset]['repository']} at "
                    f"{PUBLISHED[dataset]['revision'][:8]}); is this another revision, or are files not whole?"
                )
        texts = pq.read_table(arguments.output, columns=["prompt"])["prompt"].to_pylist()
        run.metrics({**counts, "duplicate_texts": len(texts) - len({normalised(text) for text in texts})})


if __name__ == "__main__":
    main()
