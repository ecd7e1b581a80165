"""Read the published annotations of a split into the canonical table; no image is read.

python -m workflow_scripts.stages.read_annotations --record results/downloads/imagereward/dataset.json \
    --preferences results/datasets/imagereward/test/preferences.parquet \
    --config '{"dataset": "imagereward", "split": "test"}'
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from workflow_scripts.configuration.data_stages import ReadAnnotations
from workflow_scripts.files.records import checked_raw_file, raw_folder
from workflow_scripts.preferences import hpdv2, imagereward, own_data
from workflow_scripts.preferences.published_counts import differences
from workflow_scripts.preferences.schema import write_preferences
from workflow_scripts.preferences.subsampling import normalised
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Read the published annotations of a split into the canonical table."""

    record: Input
    """dataset.json of the data set, which names the raw files."""
    preferences: Output
    """preferences.parquet: one row for each prompt."""
    config: ReadAnnotations
    """Data set, split, and the counts that are published."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config = arguments.config
    with run_stage(arguments) as run:
        record = json.loads(arguments.record.read_text(encoding="utf-8"))
        counts = write_preferences(arguments.preferences, annotated_prompts(arguments.record, record, config))
        if published := config.published:
            pairs = counts["given_pairs"] + counts["strict_pairs"] + counts["tied_pairs"]
            read = {"prompts": counts["prompts"], "images": counts["images"], "pairs": pairs}
            if other := differences(published, read):
                run.warn(
                    f"{config.dataset}, {published.name}: read {'; '.join(other)} ({published.repository} at "
                    f"{published.revision[:8]}); is this another revision, or are files not whole?"
                )
        texts = pq.read_table(arguments.preferences, columns=["prompt"])["prompt"].to_pylist()
        run.metrics({**counts, "duplicate_texts": len(texts) - len({normalised(text) for text in texts})})


def annotated_prompts(path: Path, record: dict[str, Any], config: ReadAnnotations) -> Iterable[dict[str, Any]]:
    """Start the reader of the data set, which yields rows of PREFERENCES.

    Raises:
        ProvenanceError: the raw file of annotations has changed since the record was written.
    """
    split, folder = config.split, raw_folder(record, path)
    if config.dataset == "imagereward":
        name, rows = imagereward.annotation_file(split), imagereward.read_preferences(folder, split, record["files"])
    elif config.dataset == "hpsv2":
        name, rows = hpdv2.annotation_file(split), hpdv2.read_preferences(folder, split)
    else:
        name = record["annotations"]
        rows = own_data.read_preferences(folder, name, split, record["splits"])
    checked_raw_file(name, record, path)  # before any row is read
    return rows


if __name__ == "__main__":
    main()
