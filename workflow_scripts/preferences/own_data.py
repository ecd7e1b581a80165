"""Reader of a user's own preference data: a table of judgements and a folder of images (docs/own-data.md).

The table is CSV or JSON lines with ratings, ranks or pairs, or Parquet in the canonical format of `schema`. Images are
files known by their path relative to the folder, or in Parquet members of an archive in it.
"""

import contextlib
import csv
import difflib
import json
import reprlib
from collections.abc import Iterator
from hashlib import sha256
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workflow_scripts.configuration.model import Split
from workflow_scripts.preferences.hpdv2 import canonical_row, text_digest
from workflow_scripts.preferences.schema import (
    PREFERENCES,
    SchemaError,
    check_preferences,
    reading_parquet,
    text,
    whole_number,
)
from workflow_scripts.preferences.subsampling import normalised

SPLITS = ("train", "validation", "test")
IMAGE_COLUMNS = {"pairs": ("image_a", "image_b"), "single": ("image",)}
JUDGEMENTS = {"pairs": ("preferred",), "single": ("rating", "rank")}
PREFERRED = {"0": 0, "1": 1, "a": 0, "b": 1}


def read_preferences(folder: Path, name: str, split: Split, drawn: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the canonical rows of a split, by prompt_id, whatever the order of the table; read no image.

    Ranks are derived from ratings, and pairs from ranks, where the table does not give them. In the test split, a
    prompt with several given pairs becomes one prompt for each pair: pairs need not be consistent with any ranking.

    Args:
        folder: the user's folder.
        name: the table in it, *.csv, *.jsonl or *.parquet.
        split: train, validation or test.
        drawn: `seed`, `validation_fraction` and `test_fraction` that put prompts into splits if the table has no column
            `split`.

    Raises:
        SchemaError: the table cannot be read, or a value is wrong or contradicts another: names file, row and column.
    """
    found = canonical_rows(folder, name) if name.endswith(".parquet") else _grouped(folder, name)
    rows = [row for given, row in found if split == (given or drawn_split(row["prompt"], **drawn))]
    if not rows:
        raise SchemaError(
            f"{folder / name}: no prompt is in the split {split}; write some into the column split, or change "
            "datasets.own.validation_fraction, test_fraction or split_seed"
        )
    for row in sorted(rows, key=lambda row: str(row["prompt_id"])):
        yield from _by_pair(row) if split == "test" and row["ranks"] is None else [_with_derived(row)]


def drawn_split(prompt: str, seed: int, validation_fraction: float, test_fraction: float) -> str:
    """Draw the split of a prompt by a hash of its text, whatever other prompts there are."""
    place = int.from_bytes(sha256(f"{seed}:{normalised(prompt)}".encode()).digest()[:8], "big") / 2**64
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"


def image_files(folder: Path, name: str) -> list[str]:
    """List the files that the table names, images or archives, relative to the folder.

    Raises:
        SchemaError: as `read_preferences`, or a file is missing or outside of the folder.
    """
    found = canonical_rows(folder, name) if name.endswith(".parquet") else _grouped(folder, name)
    return sorted({path for _, row in found for path in row["archives"]})


# ------------------------------------------------------------------------------------------------------ CSV, JSON lines


def _grouped(folder: Path, name: str) -> list[tuple[str | None, dict[str, Any]]]:
    """Return (split or None, row of PREFERENCES) for each prompt of a CSV or JSON lines table."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    root = folder.resolve()
    for where, cells in _table(folder / name):
        prompt = text(_present(cells, "prompt", where), "prompt", where)
        prompt_id = text(cells.get("prompt_id") or f"own-{text_digest(prompt)}", "prompt_id", where)
        if "/" in prompt_id:
            raise SchemaError(f"{where}: prompt_id {reprlib.repr(prompt_id)} must not contain /; rename it")
        kind = "pairs" if "image_a" in cells else "single"
        images = [_image_file(root, _present(cells, column, where), column, where) for column in IMAGE_COLUMNS[kind]]
        split = cells.get("split")
        if "split" in cells and split not in SPLITS:
            raise SchemaError(f"{where}: split must be one of {', '.join(SPLITS)}, got {reprlib.repr(split)}")
        row = {"where": where, "prompt": prompt, "split": split, "images": images, **_judgements(cells, kind, where)}
        first = prompts.setdefault(prompt_id, [row])[0]
        for column in ("prompt", "split"):
            if row[column] != first[column]:
                raise SchemaError(
                    f"{where}: {column} {reprlib.repr(row[column])} is not that of {first['where']}, which has the "
                    f"same prompt_id {prompt_id}; one prompt has one text and is in one split"
                )
        if row is not first:
            prompts[prompt_id].append(row)
    return [(rows[0]["split"], _canonical(prompt_id, rows)) for prompt_id, rows in prompts.items()]


def _table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the cells of each row; all rows must have the same, known columns."""
    rows = _csv_rows(path) if path.suffix == ".csv" else _json_lines(path)
    columns = None
    for where, cells in rows:
        if columns is None:
            columns = set(cells)
            _check_columns(columns, where)
        if set(cells) != columns:
            odd = sorted(set(cells) ^ columns, key=str)[0]
            raise SchemaError(f"{where}: column {odd} is here or in the rows before, but not in both")
        yield where, cells
    if columns is None:
        raise SchemaError(f"{path}: there is no row")


def _check_columns(columns: set[str], where: str) -> None:
    kind = "pairs" if columns & {"image_a", "image_b", "preferred"} else "single"
    known = ["prompt", "prompt_id", "split", *IMAGE_COLUMNS[kind], *JUDGEMENTS[kind]]
    for column in sorted(columns - set(known)):
        near = difflib.get_close_matches(column, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there may be {', '.join(known)}; remove others"
        raise SchemaError(f"{where}: column {column} is not known; {hint}")
    for column in ("prompt", *IMAGE_COLUMNS[kind]):
        if column not in columns:
            raise SchemaError(f"{where}: column {column} is missing; there are {', '.join(sorted(columns))}")
    if not columns & set(JUDGEMENTS[kind]):
        raise SchemaError(f"{where}: column {' or '.join(JUDGEMENTS[kind])} is missing: it holds the judgement")


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or []
            if len(set(header)) != len(header):
                raise SchemaError(f"{path}, line 1: a column occurs twice in {header}")
            for cells in reader:
                where = f"{path}, line {reader.line_num}"
                if None in cells or None in cells.values():
                    raise SchemaError(f"{where}: more or fewer cells than the {len(header)} columns; quote commas")
                yield where, cells
    except (csv.Error, UnicodeDecodeError) as error:
        raise SchemaError(f"{path} is no CSV table in UTF-8 ({error}); save it as such") from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SchemaError(
                    f"{where} is no JSON object in UTF-8 ({error}); one object stands on a line"
                ) from None
            if not isinstance(cells, dict):
                raise SchemaError(f"{where}: must be an object, got {reprlib.repr(cells)}")
            yield where, cells


def _present(cells: dict[str, Any], column: str, where: str) -> Any:
    if cells[column] in (None, ""):
        raise SchemaError(f"{where}: {column} is empty; fill it or remove the row")
    return cells[column]


def _judgements(cells: dict[str, Any], kind: str, where: str) -> dict[str, int]:
    """Return the judgements of a row by column, each of the right type and range."""
    found = {}
    for column in JUDGEMENTS[kind]:
        if column not in cells:
            continue
        value = _present(cells, column, where)
        if column == "preferred":
            chosen = PREFERRED.get(str(value).strip().lower())
            if chosen is None or isinstance(value, bool):
                raise SchemaError(f"{where}: preferred must be 0 or a, 1 or b, got {reprlib.repr(value)}")
            found[column] = chosen
            continue
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        found[column] = whole_number(value, column, where)
        if not 1 <= found[column] <= (7 if column == "rating" else 2**15 - 1):
            asked = "1 to 7 (7 = best)" if column == "rating" else "1 or more (1 = best)"
            raise SchemaError(f"{where}: {column} must be {asked}, got {reprlib.repr(value)}")
    return found


def _image_file(root: Path, value: object, column: str, where: str) -> str:
    """Return the path of an image relative to the folder; with links followed it must lie inside."""
    path = PurePosixPath(text(value, column, where))
    try:
        target = (root / path).resolve()
        exists = target.is_file()
    except (OSError, ValueError, RuntimeError):  # a name too long, with a null byte, or a circle of links
        target, exists = root, False
    if path.is_absolute() or ".." in path.parts or not target.is_relative_to(root):
        raise SchemaError(
            f"{where}: {column} {reprlib.repr(value)} leads out of {root}; give a path inside, relative to it"
        )
    if not exists:
        raise SchemaError(f"{where}: {column} {reprlib.repr(value)} is no file in {root}; correct it or remove the row")
    return str(path)


def image_id(path: str) -> str:
    """Make the name of an image from its path, with / written as %2F: names of items contain /."""
    return path.replace("%", "%25").replace("/", "%2F")


def _canonical(prompt_id: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the row of PREFERENCES for one prompt, with its images sorted by name."""
    paths = sorted({path for row in rows for path in row["images"]})
    row = canonical_row(prompt_id, rows[0]["prompt"], [image_id(path) for path in paths], "") | {"archives": paths}
    seen: dict[tuple[str, ...], str] = {}
    for judged in rows:
        names = tuple(sorted(judged["images"]))
        if len(set(names)) != len(judged["images"]):
            raise SchemaError(f"{judged['where']}: image_a and image_b are the same")
        if names in seen:
            raise SchemaError(
                f"{judged['where']}: {' and '.join(names)} of prompt_id {prompt_id} stands in {seen[names]} too; "
                "keep one of the rows"
            )
        seen[names] = judged["where"]
    if "preferred" in rows[0]:
        pairs = []
        for judged in rows:
            a, b = map(image_id, judged["images"])
            pairs.append(_pair(a, b, judged["preferred"]))
        return row | {"pairs": sorted(pairs, key=lambda pair: (pair["a"], pair["b"]))}
    ordered = sorted(rows, key=lambda row: str(row["images"][0]))
    columns = {"ratings": "rating", "ranks": "rank"}
    return row | {name: [judged[column] for judged in ordered] for name, column in columns.items() if column in rows[0]}


def _pair(a: str, b: str, preferred: int) -> dict[str, Any]:
    """Make a judged pair with its images sorted by name."""
    return {"a": a, "b": b, "preferred": preferred} if a < b else {"a": b, "b": a, "preferred": 1 - preferred}


# ------------------------------------------------------------------------------------------------------------- Parquet


def canonical_rows(folder: Path, name: str) -> list[tuple[str | None, dict[str, Any]]]:
    """Return (split or None, row) for each row of a table in the canonical format, with or without a column `split`.

    Raises:
        SchemaError: it has other columns, a row breaks the contract, or a file is missing or outside of the folder.
    """
    path = folder / name
    with reading_parquet(path):
        table = pq.read_table(path)
    split = table["split"].to_pylist() if "split" in table.column_names else [None] * len(table)
    table = table.drop_columns(["split"]) if "split" in table.column_names else table
    if table.schema.names != PREFERENCES.names:
        raise SchemaError(f"{path}: columns {table.schema.names} are not {PREFERENCES.names}, with split or without")
    try:
        rows = table.cast(PREFERENCES).to_pylist()
    except pa.ArrowException as error:
        raise SchemaError(f"{path}: a column has another type than the canonical format ({error})") from None
    root = folder.resolve()
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        check_preferences(row, where)
        if not (row["ratings"] or row["ranks"] or row["pairs"]):
            raise SchemaError(f"{where}: holds neither ratings nor ranks nor pairs; remove it")
        if split[number] not in (None, *SPLITS):
            raise SchemaError(f"{where}: split must be one of {', '.join(SPLITS)}, got {reprlib.repr(split[number])}")
        for archive in row["archives"]:
            _image_file(root, archive, "archives", where)
    return list(zip(split, rows, strict=True))


# --------------------------------------------------------------------------------------------------- what is derived


def _with_derived(row: dict[str, Any]) -> dict[str, Any]:
    """Add ranks from ratings and pairs from ranks to a row that lacks them."""
    ranks = row["ranks"]
    if ranks is None and row["ratings"]:
        ranks = [1 + sum(other > rating for other in row["ratings"]) for rating in row["ratings"]]
    pairs = row["pairs"]
    if pairs is None and ranks:
        judged = combinations(zip(row["image_ids"], ranks, strict=True), 2)
        pairs = [_pair(a, b, int(second < first)) for (a, first), (b, second) in judged if first != second]
    return row | {"ranks": ranks, "pairs": pairs}


def _by_pair(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each given pair as a prompt of two ranked images; a row with ratings as a whole."""
    if row["ratings"]:
        yield _with_derived(row)
        return
    archives = dict(zip(row["image_ids"], row["archives"], strict=True))
    several = len(row["pairs"]) > 1
    for number, pair in enumerate(row["pairs"]):
        name = f"{row['prompt_id']}-pair{number:04d}" if several else row["prompt_id"]
        yield canonical_row(name, row["prompt"], [pair["a"], pair["b"]], "") | {
            "archives": [archives[pair["a"]], archives[pair["b"]]],
            "ranks": [1 + pair["preferred"], 2 - pair["preferred"]],
            "pairs": [pair],
        }
