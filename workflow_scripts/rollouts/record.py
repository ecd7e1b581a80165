"""The rollout record: one row for each item and k, all that is ever needed of the model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from workflow_scripts.files.writing import replacing
from workflow_scripts.preferences.schema import read_table

ROLLOUT = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("candidate", pa.string(), nullable=False),  # image that the score belongs to
        pa.field("anchor", pa.string()),  # null: a single image
        pa.field("candidate_second", pa.bool_()),  # pairs: whether the candidate was shown second
        pa.field("k", pa.int32(), nullable=False),  # number of the rollout of this item, from 0 over all blocks
        pa.field("seed", pa.uint64(), nullable=False),  # of the batch's random generator
        pa.field("completion_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("answer_position", pa.int32(), nullable=False),  # index in completion_ids whose logits are recorded
        pa.field("forced", pa.bool_(), nullable=False),  # the engine closed the thinking
        pa.field("sampled_answer", pa.int8()),  # null: none, or not a valid one
        # Over the answer tokens in ascending order, renormalised, before temperature and other sampling settings.
        pa.field("answer_logprobs", pa.list_(pa.float64()), nullable=False),
    ]
)


def write_rollouts(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the order of item and k, atomically."""
    rows = sorted(rows, key=lambda row: (row["item_id"], row["k"]))
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=ROLLOUT), temporary, compression="zstd")


def sample_texts(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Texts of the first three rollouts in the order of their file, by the name of a file for each."""
    first = sorted(rows, key=lambda row: (row["item_id"], row["k"]))[:3]
    return {f"traces/{row['item_id'].replace('/', '_')}-{row['k']}.txt": row["text"] for row in first}


def read_rollouts(paths: Iterable[Path], columns: list[str] | None = None) -> pd.DataFrame:
    """Rows of several files, one file after the other; all columns of ROLLOUT or some. Missing values are None or nan.

    Pairs are as they were shown: `scoring.image_scores.rollout_scores` resolves their presentation order.

    Raises:
        SchemaError: a file has other columns, or cannot be read.
    """
    tables = [read_table(path, ROLLOUT, columns) for path in paths]
    return pa.concat_tables(tables).to_pandas(integer_object_nulls=True)
