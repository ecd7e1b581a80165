"""Canonical tables of preference data, the same for every data set, checked on write and on read.

preferences.parquet has one row per prompt. Ranks are 1 = best, ties allowed, smallest rank not always 1. `pairs` holds
judgements published as pairs, with `preferred` = 0 for image a and 1 for image b; pairs are derived from ranks.
"""

import contextlib
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workflow_scripts.files.writing import replacing

ROW_GROUP = 4096  # prompts written at once
IMAGE_ROW_GROUP = 256  # images written or read at once

PAIR = pa.struct([("a", pa.string()), ("b", pa.string()), ("preferred", pa.int8())])

PREFERENCES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("image_ids", pa.list_(pa.string()), nullable=False),
        pa.field("archives", pa.list_(pa.string()), nullable=False),  # of each image, relative to the download folder
        pa.field("ranks", pa.list_(pa.int16())),
        pa.field("ratings", pa.list_(pa.int8())),  # overall rating 1..7, the training target of the pointwise track
        pa.field("alignment_ratings", pa.list_(pa.int8())),
        pa.field("fidelity_ratings", pa.list_(pa.int8())),
        pa.field("pairs", pa.list_(PAIR)),
        pa.field("annotations", pa.list_(pa.list_(pa.int16()))),  # ranks by each annotator
    ]
)

SUBSET = PREFERENCES.append(pa.field("position", pa.int64(), nullable=False))  # rank in the seeded hash order

IMAGES = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("bytes", pa.binary(), nullable=False),  # encoded as published
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)

LARGEST_RANK = 2**15 - 1  # of the column's type


class SchemaError(ValueError):
    """A table breaks its contract: names file, row and remedy."""


def text(value: object, name: str, where: str) -> str:
    """Return a value that must be a text; it may be empty.

    Raises:
        SchemaError: it is not a text, or has no UTF-8 form (half of a surrogate pair).
    """
    if isinstance(value, str):
        try:
            value.encode()
            return value
        except UnicodeEncodeError:
            pass
    raise SchemaError(f"{where}: {name} must be a text, got {reprlib.repr(value)}")


def whole_number(value: object, name: str, where: str) -> int:
    """Return a value that must be a whole number, such as 3 or 3.0.

    Raises:
        SchemaError: it is not a whole number.
    """
    if type(value) is int or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise SchemaError(f"{where}: {name} must be a whole number, got {reprlib.repr(value)}")


def image_name(path: object, where: str) -> str:
    """Return the base name of an image, by which it is known in its archive.

    Raises:
        SchemaError: the path is not a text, or names no file.
    """
    whole = text(path, "the path of an image", where)
    name = whole.rpartition("/")[2]
    if name in ("", "."):  # "a/" and "a/." are a, too; PurePosixPath for every path would take half of a reader's time
        name = PurePosixPath(whole).name
    if name in ("", ".."):
        raise SchemaError(f"{where}: the path of an image must name a file, got {reprlib.repr(path)}")
    return name


def check_preferences(row: dict[str, Any], where: str) -> None:
    """Check one row of PREFERENCES or SUBSET.

    Raises:
        SchemaError: lists of unequal length, an image twice, a rank or rating out of its range, a pair of unknown
            images, or names from which no name of an item can be made.
    """
    images = row["image_ids"]
    if not row["prompt_id"] or "/" in "".join((row["prompt_id"], *images)):
        raise SchemaError(f"{where}: prompt_id must not be empty, and neither it nor an image may contain /")
    if not images or len(set(images)) != len(images):
        raise SchemaError(f"{where}: image_ids must be one or more different names, got {images}")
    for column in ("archives", "ranks", "ratings", "alignment_ratings", "fidelity_ratings"):
        if row.get(column) is not None and len(row[column]) != len(images):
            raise SchemaError(f"{where}: {column} has {len(row[column])} entries for {len(images)} images")
        if None in (row.get(column) or ()):
            raise SchemaError(f"{where}: {column} has an empty entry: {row[column]}")
    annotations = row.get("annotations") or []
    for ranks in annotations:
        if len(ranks) != len(images):
            raise SchemaError(f"{where}: an annotator gives {len(ranks)} ranks for {len(images)} images")
    for rank in (*(row.get("ranks") or ()), *(rank for ranks in annotations for rank in ranks)):
        if not 0 <= rank <= LARGEST_RANK:
            raise SchemaError(f"{where}: rank {rank} is outside 0..{LARGEST_RANK}")
    for column in ("ratings", "alignment_ratings", "fidelity_ratings"):
        for rating in row.get(column) or []:
            if not 1 <= rating <= 7:
                raise SchemaError(f"{where}: rating {rating} is outside 1..7 in {column}")
    for pair in row.get("pairs") or []:
        if pair["a"] == pair["b"] or not {pair["a"], pair["b"]} <= set(images) or pair["preferred"] not in (0, 1):
            raise SchemaError(f"{where}: pair {pair} must name two different images of the prompt and prefer 0 or 1")


def write_preferences(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema = PREFERENCES) -> dict[str, int]:
    """Write rows as they come, after checking each, atomically.

    Returns:
        Number of prompts, images, given pairs, strictly ranked pairs and tied pairs.

    Raises:
        SchemaError: a row breaks the contract, a prompt_id occurs twice, or there is no row.
    """
    seen: set[str] = set()
    counts = dict.fromkeys(("prompts", "images", "given_pairs", "strict_pairs", "tied_pairs"), 0)
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for batch in batched(rows, ROW_GROUP):
            for row in batch:
                where = f"{path.name}, prompt_id {row['prompt_id']}"
                check_preferences(row, where)
                if row["prompt_id"] in seen:
                    raise SchemaError(f"{where}: occurs twice; rows must be grouped by prompt_id")
                seen.add(row["prompt_id"])
                for name, number in count_pairs(row).items():
                    counts[name] += number
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
        if not seen:
            raise SchemaError(f"{path}: there is no prompt to write; is this the right split and data set?")
    return counts


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def count_pairs(row: dict[str, Any]) -> dict[str, int]:
    """Count what a row adds to the counts of `write_preferences`."""
    total = len(row["image_ids"]) * (len(row["image_ids"]) - 1) // 2
    ranks = row["ranks"]
    tied = sum(n * (n - 1) // 2 for n in Counter(ranks).values()) if ranks else 0
    return {
        "prompts": 1,
        "images": len(row["image_ids"]),
        "given_pairs": len(row["pairs"] or ()),
        "strict_pairs": total - tied if ranks else 0,
        "tied_pairs": tied,
    }


def read_table(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read a table that must have this schema: all of it, or some columns.

    Raises:
        SchemaError: the file's columns are others, or it cannot be read.
    """
    check_schema(path, schema)
    with reading_parquet(path):
        return pq.read_table(path, columns=columns)


def check_schema(path: Path, schema: pa.Schema) -> None:
    """Check the columns of a Parquet file.

    Raises:
        SchemaError: the file's columns are others, or it cannot be read.
    """
    with reading_parquet(path):
        found = pq.read_schema(path)
    if found != schema:
        raise SchemaError(
            f"{path}: columns {found.names} are not {schema.names} of the expected types; "
            "delete the file and run snakemake again to make it anew"
        )


@contextlib.contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Turn the exceptions that pyarrow raises at a damaged file into a SchemaError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise SchemaError(
            f"{path} cannot be read as Parquet ({type(error).__name__}: {error}); "
            "delete the file, for a raw one the dataset.json of its data set too, and run snakemake again"
        ) from error


def write_images(path: Path, rows: Iterable[dict[str, Any]]) -> set[str]:
    """Write rows of IMAGES as they come, atomically; return their image_ids."""
    written: set[str] = set()
    with replacing(path) as temporary, pq.ParquetWriter(temporary, IMAGES, compression="none") as writer:
        for batch in batched(rows, IMAGE_ROW_GROUP):
            writer.write_table(pa.Table.from_pylist(batch, schema=IMAGES))
            written.update(row["image_id"] for row in batch)
    return written


def read_image_rows(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Stream rows of IMAGES files, never all in memory.

    Raises:
        SchemaError: a file is no images table, or cannot be read.
    """
    for path in paths:
        check_schema(path, IMAGES)
        with reading_parquet(path), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=IMAGE_ROW_GROUP):
                yield from batch.to_pylist()
