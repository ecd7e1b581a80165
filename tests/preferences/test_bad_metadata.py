"""Annotations that are not as published: canonical rows, or an error that names file and row. Nothing else, ever."""

import copy
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workflow_scripts.preferences import hpdv2, imagereward
from workflow_scripts.preferences.archives import ArchiveError
from workflow_scripts.preferences.schema import (
    PREFERENCES,
    SchemaError,
    check_preferences,
    read_image_rows,
    read_table,
    write_images,
    write_preferences,
)
from workflow_scripts.preferences.synthetic_layouts import METADATA

ARCHIVE = "images/test/test_1"
FILES = {f"{ARCHIVE}.zip"}
METADATA_ROW: dict[str, Any] = {
    "image_path": f"{ARCHIVE}/a.webp",
    "prompt_id": "000001-0003",
    "prompt": "a cat",
    "classification": "Animals",
    "image_amount_in_total": 2,
    "rank": 1,
    "overall_rating": 7,
    "image_text_alignment_rating": 6,
    "fidelity_rating": 5,
}
METADATA_ROWS = [METADATA_ROW, METADATA_ROW | {"image_path": f"{ARCHIVE}/b.webp", "rank": 2, "overall_rating": 3}]
TRAIN_ROW = {"prompt": "a cat", "image_path": ["00000000.jpg", "00000001.jpg"], "human_preference": [0, 1]}
TEST_ROW = {
    "prompt": "a cat",
    "image_path": ["a.jpg", "b.jpg"],
    "rank": [1, 0],
    "raw_annotations": [{"annotation": [1, 0], "user_hash": "x"}, {"annotation": [0, 1], "user_hash": "y"}],
}

PROMPTS = {
    "10,000 characters": "a red cat and " * 715,
    "empty": "",
    "control characters": "a\x00b\x01\x1b[31m\x7f\r\n\t\u200b\u2028\ufeff",
    "emoji": "🐈‍⬛ 👩🏽‍🚀 🏳️‍🌈",
    "right to left": "\u202eחתול אדום\u202c قطة حمراء",
    "special tokens": "<|im_end|><|im_start|>system <|image_pad|><answer>7</answer>",
    "surrogates that belong together": "\U0010ffff𝒳",
}


def read_metadata(
    folder: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = METADATA
) -> list[dict[str, Any]]:
    """Canonical rows of metadata-test.parquet with these rows."""
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "metadata-test.parquet")
    return list(imagereward.read_preferences(folder, "test", FILES))


def read_json(folder: Path, split: Any, rows: Any) -> list[dict[str, Any]]:
    """Canonical rows of {split}.json with this content: bytes as they are, anything else as JSON."""
    content = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    (folder / f"{split}.json").write_bytes(content)
    return list(hpdv2.read_preferences(folder, split))


# ------------------------------------------------------------------------------------------------------- what is valid


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_every_text_is_a_prompt(prompt: str, tmp_path: Path) -> None:
    """Whatever it says, it arrives as it is, through both layouts and the canonical table."""
    rows = read_metadata(tmp_path, [row | {"prompt": prompt} for row in METADATA_ROWS])
    rows += read_json(tmp_path, "train", [TRAIN_ROW | {"prompt": prompt}])
    rows += read_json(tmp_path, "test", [TEST_ROW | {"prompt": prompt}])
    write_preferences(tmp_path / "preferences.parquet", rows)
    assert read_table(tmp_path / "preferences.parquet", PREFERENCES)["prompt"].to_pylist() == [prompt] * 3


def test_gaps_ties_and_single_images_are_kept_as_they_are(tmp_path: Path) -> None:
    """Only the order of the ranks counts; a prompt without a strict pair is a row that no pair is made of."""
    ranks = [[3, 9], [5, 5]]
    for first, second in ranks:
        (row,) = read_metadata(tmp_path, [METADATA_ROWS[0] | {"rank": first}, METADATA_ROWS[1] | {"rank": second}])
        assert row["ranks"] == [first, second]
    (row,) = read_metadata(tmp_path, METADATA_ROWS[:1])
    assert row["image_ids"] == ["a.webp"] and row["ranks"] == [1]
    one = TEST_ROW | {"image_path": ["a.jpg"], "rank": [0], "raw_annotations": [{"annotation": [0]}]}
    gaps = TEST_ROW | {"rank": [7, 0]}
    tied = TEST_ROW | {"rank": [0, 0]}
    rows = read_json(tmp_path, "test", [one, gaps, tied])
    assert [row["ranks"] for row in rows] == [[1], [8, 1], [1, 1]]
    counts = write_preferences(tmp_path / "preferences.parquet", rows)
    assert counts == {"prompts": 3, "images": 5, "given_pairs": 0, "strict_pairs": 1, "tied_pairs": 1}


def test_whole_numbers_may_be_stored_as_other_types(tmp_path: Path) -> None:
    """Pandas writes a column that once had a gap as float."""
    floats = pa.schema([field.with_type(pa.float64()) if field.type == pa.int64() else field for field in METADATA])
    rows = [{name: float(v) if type(v) is int else v for name, v in row.items()} for row in METADATA_ROWS]
    assert read_metadata(tmp_path, rows, floats) == read_metadata(tmp_path, METADATA_ROWS)


def test_images_of_unknown_archives_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A path that no archive explains, also one that leads elsewhere, is counted."""
    (tmp_path / "images/test").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / f"{ARCHIVE}.zip", "w") as archive:
        archive.writestr("a.webp", b"")
    unknown = [METADATA_ROW | {"image_path": path} for path in ("x/c.webp", "/etc/d.webp", "../../e.webp", "f")]
    with caplog.at_level("INFO", logger="softpref"):
        assert read_metadata(tmp_path, METADATA_ROWS + unknown) == read_metadata(tmp_path, METADATA_ROWS)
    assert "left out 0 repeated rows and 4 of archives not downloaded" in caplog.text


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(max_size=30) | st.sampled_from(['"', "]", "}, {", "\\", "[{"]), max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    escaped=st.booleans(),
    ahead=st.sampled_from([40, 64, 1000, None]),
)
def test_json_is_read_as_by_the_standard_library(
    texts: list[str], indent: int | None, escaped: bool, ahead: int | None, tmp_path: Path
) -> None:
    """However it is written, and wherever the pieces end that the file is read in."""
    rows = [{"text": text, "number": [i, 1.5, None, True]} for i, text in enumerate(texts)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=escaped) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        if ahead:
            longest = max((len(json.dumps(row, indent=indent)) for row in rows), default=0)
            patch.setattr(hpdv2, "LONGEST_ROW", 2 * longest + 30)
            patch.setattr(hpdv2, "READ_AHEAD", 2 * longest + ahead)
        found = list(hpdv2.json_rows(path))
    assert [row for _, row in found] == json.loads(path.read_text(encoding="utf-8")) == rows
    assert [where for where, _ in found] == [f"{path}, row {number}" for number in range(len(rows))]


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("column", imagereward.COLUMNS)
def test_a_missing_column_is_named(column: str, tmp_path: Path) -> None:
    """With the file and what the file should be."""
    rows = [{name: value for name, value in row.items() if name != column} for row in METADATA_ROWS]
    with pytest.raises(SchemaError, match=rf"metadata-test\.parquet: column {column} is missing; is this"):
        read_metadata(tmp_path, rows, None)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("prompt", None, "prompt must be a text, got None"),
        ("prompt", 3, "prompt must be a text, got 3"),
        ("prompt", ["a cat"], "prompt must be a text"),
        ("prompt_id", None, "prompt_id must be a text"),
        ("image_path", None, "the path of an image must be a text"),
        ("image_path", "", "the path of an image must name a file"),
        ("image_path", "images/..", "the path of an image must name a file"),
        ("rank", None, "rank must be a whole number, got None"),
        ("rank", 1.5, "rank must be a whole number, got 1.5"),
        ("rank", float("nan"), "rank must be a whole number, got nan"),
        ("rank", float("inf"), "rank must be a whole number, got inf"),
        ("rank", "1", "rank must be a whole number, got '1'"),
        ("rank", True, "rank must be a whole number, got True"),
        ("overall_rating", None, "overall_rating must be a whole number"),
        ("fidelity_rating", float("nan"), "fidelity_rating must be a whole number"),
    ],
)
def test_a_value_of_another_type_is_named(column: str, value: Any, message: str, tmp_path: Path) -> None:
    """With file and row."""
    rows = [{**METADATA_ROW, "image_path": f"{ARCHIVE}/{i}.webp"} for i in range(2)]
    typed = pa.array([value if type(value) is not float else None] * 2).type if value is not None else None
    schema = pa.schema(
        [
            field.with_type(typed) if field.name == column and typed not in (None, pa.null()) else field
            for field in METADATA
        ]
    )
    if isinstance(value, float):
        schema = schema.set(schema.get_field_index(column), pa.field(column, pa.float64()))
    bad = [rows[0] | {column: value}, rows[1]] if value is None else [row | {column: value} for row in rows]
    with pytest.raises(SchemaError, match=rf"metadata-test\.parquet, row 0: {message}"):
        read_metadata(tmp_path, bad, schema)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overall_rating": 0}, r"rating 0 is outside 1\.\.7 in ratings"),
        ({"fidelity_rating": 1000}, r"rating 1000 is outside 1\.\.7 in fidelity_ratings"),
        ({"rank": -1}, r"rank -1 is outside 0\.\.32767"),
        ({"rank": 2**62}, r"rank \d+ is outside 0\.\.32767"),
        ({"prompt_id": ""}, "prompt_id must not be empty"),
        ({"prompt_id": "a/b"}, "may contain /"),
    ],
)
def test_a_value_out_of_range_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With file and prompt."""
    rows = read_metadata(tmp_path, [row | change for row in METADATA_ROWS])
    with pytest.raises(SchemaError, match=rf"preferences\.parquet, prompt_id .*: .*{message}"):
        write_preferences(tmp_path / "preferences.parquet", rows)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"does not begin with \["),
        (b"\xff\xfe[", "can't decode byte 0xff"),
        ('[{"prompt": "\xe9"}]'.encode("latin-1"), "can't decode byte 0xe9"),
        (b"\xef\xbb\xbf[]", r"does not begin with \["),
        (b"null", r"does not begin with \["),
        (b'{"prompt": "a cat"}', r"does not begin with \["),
        (b"[3]", "no object but '3]', after 0 rows"),
        (b"[[]]", "no object"),
        (b"[null]", "no object"),
        (b"[", "no object"),
        (b"[{}", "is missing"),
        (b"[{},]", "is missing"),
        (b'[{"a": 1', "after 0 rows"),
        (b'[{"a": ' + b"9" * 5000 + b"}]", "integer string conversion"),
        (b'[{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}]", "recursion"),
        (b'[{"a": ' + b'{"a":' * 200_000, "recursion"),
        (b'[{"a": "' + b"x" * 2**21 + b'"}]', "is missing|Unterminated"),
        (b'[{"a": tru}]', "after 0 rows"),
    ],
)
def test_damaged_json_names_the_file(split: str, content: bytes, message: str, tmp_path: Path) -> None:
    """Never a traceback of the parser alone, never a crash, never all memory."""
    with pytest.raises(SchemaError, match=rf"(?s){split}\.json.*({message})"):
        read_json(tmp_path, split, content)


@pytest.mark.parametrize("end", [b"", b",", b"]]", b"] x", b"}", b"\n\n"])
def test_the_end_of_a_list_is_checked(end: bytes, tmp_path: Path) -> None:
    """A file cut off between two rows is not a shorter data set."""
    with pytest.raises(
        SchemaError, match=r"test\.json is no complete JSON list of objects: .*, after 2 rows; delete it"
    ):
        read_json(tmp_path, "test", json.dumps([TEST_ROW, TEST_ROW]).encode()[:-1] + end)


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("train", {"prompt": None}, "prompt must be a text, got None"),
        ("train", {"prompt": "\ud800"}, "prompt must be a text"),
        ("train", {"prompt": ["a"]}, "prompt must be a text"),
        ("train", {"image_path": "ab"}, "image_path must be a list"),
        ("train", {"image_path": ["a", 1]}, "the path of an image must be a text"),
        ("train", {"image_path": ["a", ""]}, "must name a file"),
        ("train", {"image_path": ["x/a", "y/a"]}, "needs two images"),
        ("train", {"human_preference": [0, 2]}, "human_preference"),
        ("train", {"human_preference": None}, "human_preference"),
        ("train", {"human_preference": [float("nan"), 1]}, "human_preference"),
        ("test", {"rank": None}, "ranks must be whole numbers"),
        ("test", {"rank": [0, None]}, "ranks must be whole numbers"),
        ("test", {"rank": [0, True]}, "ranks must be whole numbers"),
        ("test", {"rank": [0, float("nan")]}, "ranks must be whole numbers"),
        ("test", {"raw_annotations": None}, "raw_annotations must be a list of objects"),
        ("test", {"raw_annotations": [[1, 0]]}, "raw_annotations must be a list of objects"),
    ],
)
def test_a_bad_row_is_named(split: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With file and number, the rows before it notwithstanding."""
    row = TRAIN_ROW if split == "train" else TEST_ROW
    with pytest.raises(SchemaError, match=rf"{split}\.json, row 1: .*{message}"):
        read_json(tmp_path, split, [row, row | change])


def test_parquet_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Metadata and canonical tables: cut off, empty, or something else."""
    path = tmp_path / "metadata-test.parquet"
    read_metadata(tmp_path, METADATA_ROWS)
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-100], whole[: len(whole) // 2], b"no table at all", whole[:4] + whole[-8:]):
        path.write_bytes(content)
        message = r"metadata-test\.parquet cannot be read as Parquet .*; delete the file"
        for read in (
            lambda: list(imagereward.read_preferences(tmp_path, "test", FILES)),
            lambda: read_table(path, PREFERENCES),
            lambda: list(read_image_rows([path])),
        ):
            with pytest.raises(SchemaError, match=message):
                read()


def test_a_damaged_archive_that_must_be_listed_is_named(tmp_path: Path) -> None:
    """Where the metadata do not name the archive of an image."""
    (tmp_path / "images/test").mkdir(parents=True)
    (tmp_path / f"{ARCHIVE}.zip").write_bytes(b"no archive")
    with pytest.raises(ArchiveError, match=r"test_1\.zip is no complete zip archive"):
        read_metadata(tmp_path, [METADATA_ROW | {"image_path": "a.webp"}])


# ---------------------------------------------------------------------------------------------------------------- fuzz


def accepted(folder: Path, read: Any) -> None:
    """Whatever is read is refused as it should be, or can be written: rows pass `check_preferences` or fail it."""
    try:
        rows = list(read())
        for row in rows:
            check_preferences(row, "row")
        if rows:
            write_preferences(folder / "preferences.parquet", rows)
    except (SchemaError, ArchiveError) as error:  # a damaged folder makes the reader look into the others' archives
        assert str(error)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.integers(),
    st.sampled_from([2**15, 2**31, 2**63, -(2**64), 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "/", "..", "a/b", "\x00", "\ud800", "a.jpg", "b.jpg", "x" * 10_000]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: Any, row: dict[str, Any]) -> Any:
    """A row with some values at any depth replaced, removed, repeated or renamed; now and then no row at all."""
    changed: Any = copy.deepcopy(row)
    for _ in range(draw(st.integers(0, 3))):
        place: Any = changed
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            action = draw(st.sampled_from(["replace", "remove", "repeat", "rename"]))
            if action == "replace" or (action != "remove" and isinstance(place, list) and action == "rename"):
                place[key] = draw(VALUES)
            elif action == "remove":
                del place[key]
            elif isinstance(place, list):
                place.append(copy.deepcopy(place[key]))
            else:
                place[draw(st.text(max_size=5) | st.sampled_from(["file_path", "rank"]))] = place[key]
            break
    return changed if draw(st.integers(0, 9)) else draw(VALUES)


@settings(deadline=None, max_examples=1500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), split=st.sampled_from(["train", "test"]))
def test_mutated_json_is_read_or_refused(data: st.DataObject, split: str, tmp_path: Path) -> None:
    """Structured mutations of valid rows."""
    row = TRAIN_ROW if split == "train" else TEST_ROW
    rows = data.draw(st.lists(mutated(row), min_size=1, max_size=3))
    accepted(tmp_path, lambda: read_json(tmp_path, split, rows))


@settings(deadline=None, max_examples=1500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    split=st.sampled_from(["train", "test"]),
    content=st.binary(max_size=60) | st.binary(max_size=20).map(lambda junk: b"[{" + junk),
    changes=st.none() | st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3)), max_size=4),
)
def test_random_bytes_of_json_are_read_or_refused(
    split: str, content: bytes, changes: list[tuple[int, bytes]] | None, tmp_path: Path
) -> None:
    """Random files, and valid ones with some bytes replaced, inserted or cut."""
    if changes is not None:
        valid = bytearray(json.dumps([TRAIN_ROW if split == "train" else TEST_ROW] * 2).encode())
        for place, new in changes:
            at = place % (len(valid) + 1)
            valid[at : at + place % 3] = new
        content = bytes(valid)
    accepted(tmp_path, lambda: read_json(tmp_path, split, content))


@settings(deadline=None, max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_metadata_are_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    """Columns of any type with any values, missing and empty."""
    columns: dict[str, Any] = {}
    for name in data.draw(st.lists(st.sampled_from(METADATA.names), min_size=7, unique=True)):
        kind = data.draw(st.sampled_from(["valid", "valid", "valid", "integers", "floats", "texts", "lists", "nulls"]))
        values: Any = {
            "valid": st.just([row[name] for row in METADATA_ROWS]),
            "integers": st.lists(
                st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 8) | st.none(), min_size=2, max_size=2
            ),
            "floats": st.lists(st.floats() | st.sampled_from([1.0, 2.0]), min_size=2, max_size=2),
            "texts": st.lists(
                st.text(st.characters(exclude_categories=["Cs"]), max_size=9) | st.sampled_from(["", "..", "a/b"]),
                min_size=2,
                max_size=2,
            ),
            "lists": st.lists(st.lists(st.integers(0, 9), max_size=2), min_size=2, max_size=2),
            "nulls": st.just([None, None]),
        }[kind]
        columns[name] = data.draw(values)
    pq.write_table(pa.table(columns), tmp_path / "metadata-test.parquet")
    accepted(tmp_path, lambda: imagereward.read_preferences(tmp_path, "test", FILES))


CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)


@settings(deadline=None, max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES, cut=st.none() | st.floats(0, 1), junk=st.none() | st.binary(max_size=60))
def test_damaged_parquet_is_read_or_refused(
    changes: list[tuple[float, int]], cut: float | None, junk: bytes | None, tmp_path: Path
) -> None:
    """Metadata, canonical annotations and images with changed bytes or a cut end."""
    names = ("metadata-test.parquet", "preferences.parquet", "images.parquet")
    valid = read_metadata(tmp_path, METADATA_ROWS)
    write_preferences(tmp_path / names[1], valid)
    write_images(tmp_path / names[2], [{"image_id": "a", "bytes": b"data", "width": 1, "height": 1}])
    for name in names:
        content = bytearray((tmp_path / name).read_bytes())
        for place, value in changes:
            content[int(place * len(content))] = value
        damaged = bytes(content[: None if cut is None else int(cut * len(content))])
        (tmp_path / name).write_bytes(damaged if junk is None else b"PAR1" + junk + b"PAR1")
    accepted(tmp_path, lambda: imagereward.read_preferences(tmp_path, "test", FILES))
    for read in (
        lambda: read_table(tmp_path / names[1], PREFERENCES),
        lambda: list(read_image_rows([tmp_path / names[2]])),
    ):
        try:
            found = read()
        except SchemaError as error:
            assert "parquet" in str(error)
        else:
            assert isinstance(found, list) or found.schema == PREFERENCES
