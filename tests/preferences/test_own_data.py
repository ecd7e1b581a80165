"""Own data: CSV, JSON lines and Parquet to canonical rows, splits, what is derived, and what is refused."""

import csv
import io
import json
import random
import re
import zipfile
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from workflow_scripts.configuration.model import load
from workflow_scripts.configuration.stages import ReadAnnotations, ReadImages, RecordOwnData
from workflow_scripts.files.records import ProvenanceError
from workflow_scripts.preferences.own_data import SPLITS, drawn_split, image_files, read_preferences
from workflow_scripts.preferences.schema import (
    IMAGES,
    PREFERENCES,
    SUBSET,
    SchemaError,
    check_preferences,
    read_table,
    write_preferences,
)

DRAWN = {"seed": 0, "validation_fraction": 0.2, "test_fraction": 0.3}
FILES = ("a.png", "b.png", "more/a.png", "more/c%2F.png", "übung 1.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images, one in a folder below; tables are written into it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "more").mkdir()
    for number, name in enumerate(FILES):
        Image.new("RGB", (20, 20), (number * 40, 0, 0)).save(folder / name)
    return folder


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as CSV; return the file's name."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path.name


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as JSON lines; return the file's name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def read_all(folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of every split that has any."""
    found = {}
    for split in SPLITS:
        try:
            found[split] = list(read_preferences(folder, name, split, DRAWN))  # type: ignore[arg-type]
        except SchemaError as error:
            assert "no prompt is in the split" in str(error)
    return found


def train(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Training rows of a CSV table."""
    name = write_csv(folder / "t.csv", [{"split": "train"} | row for row in rows])
    return list(read_preferences(folder, name, "train", DRAWN))


# ------------------------------------------------------------------------------------------------------------ the rows


def test_ratings_become_a_canonical_row(folder: Path) -> None:
    given_rows = [("b.png", 3), ("more/a.png", 7), ("a.png", 3)]
    (row,) = train(folder, [{"prompt": "a cat", "image": image, "rating": rating} for image, rating in given_rows])
    assert set(row) == set(PREFERENCES.names)
    assert row["prompt"] == "a cat" and row["prompt_id"].startswith("own-")
    assert row["image_ids"] == ["a.png", "b.png", "more%2Fa.png"]
    assert row["archives"] == ["a.png", "b.png", "more/a.png"]
    assert row["ratings"] == [3, 3, 7]
    assert row["ranks"] == [2, 2, 1]
    assert row["pairs"] == [
        {"a": "a.png", "b": "more%2Fa.png", "preferred": 1},
        {"a": "b.png", "b": "more%2Fa.png", "preferred": 1},
    ]


def test_ranks_and_ratings_that_disagree_are_both_kept(folder: Path) -> None:
    rows = [{"prompt": "p", "image": i, "rating": r, "rank": k} for i, r, k in (("a.png", 7, 2), ("b.png", 1, 1))]
    (row,) = train(folder, rows)
    assert (row["ratings"], row["ranks"]) == ([7, 1], [2, 1])
    assert row["pairs"] == [{"a": "a.png", "b": "b.png", "preferred": 1}]


@pytest.mark.parametrize("words", [("0", "1"), ("a", "b"), ("A", " B")])
def test_pairs_name_the_preferred_image(folder: Path, words: tuple[str, str]) -> None:
    shown = [("b.png", "a.png", words[0]), ("a.png", "more/a.png", words[1])]
    (row,) = train(folder, [{"prompt": "p", "image_a": a, "image_b": b, "preferred": p} for a, b, p in shown])
    assert row["pairs"] == [
        {"a": "a.png", "b": "b.png", "preferred": 1},
        {"a": "a.png", "b": "more%2Fa.png", "preferred": 1},
    ]
    assert row["ranks"] is None and row["ratings"] is None


def test_each_pair_of_the_test_split_is_a_prompt_of_its_own(folder: Path) -> None:
    cyclic = [("a.png", "b.png", 0), ("b.png", "more/a.png", 0), ("more/a.png", "a.png", 0)]  # no ranks agree with it
    rows = [{"prompt": "p", "split": "test", "image_a": a, "image_b": b, "preferred": p} for a, b, p in cyclic]
    rows.append({"prompt": "q", "split": "test", "image_a": "b.png", "image_b": "a.png", "preferred": 0})
    found = read_all(folder, write_csv(folder / "t.csv", rows))["test"]
    assert len({row["prompt_id"] for row in found}) == 4
    assert Counter(row["prompt"] for row in found) == {"p": 3, "q": 1}
    for row in found:
        better = row["image_ids"][row["ranks"].index(1)]
        (pair,) = row["pairs"]
        assert better == pair["ab"[pair["preferred"]]]
        assert row["archives"] == [name.replace("%2F", "/") for name in row["image_ids"]]
    winners = sorted(row["image_ids"][row["ranks"].index(1)] for row in found if row["prompt"] == "p")
    assert winners == ["a.png", "b.png", "more%2Fa.png"]


texts = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from(',"\n;'), min_size=1, max_size=12)


@st.composite
def tables(draw: Any) -> list[dict[str, Any]]:
    """Rows of a table with ratings, ranks or pairs: prompts with any texts, each image or pair of a prompt once."""
    kind = draw(st.sampled_from(["rating", "rank", "pairs"]))
    with_split, with_id = draw(st.booleans()), draw(st.booleans())
    rows = []
    for number, prompt in enumerate(draw(st.lists(texts, min_size=1, max_size=4, unique=True))):
        head: dict[str, Any] = {"prompt": prompt}
        head |= {"split": draw(st.sampled_from(SPLITS))} if with_split else {}
        head |= {"prompt_id": f"id {number}"} if with_id else {}
        if kind == "pairs":
            for a, b in draw(st.lists(st.sampled_from(list(combinations(FILES, 2))), min_size=1, unique=True)):
                a, b = draw(st.permutations((a, b)))
                rows.append(head | {"image_a": a, "image_b": b, "preferred": draw(st.integers(0, 1))})
        else:
            for image in draw(st.lists(st.sampled_from(FILES), min_size=1, unique=True)):
                rows.append(head | {"image": image, kind: draw(st.integers(1, 7))})
    return rows


@settings(deadline=None, max_examples=60)
@given(rows=tables(), rng=st.integers(0, 2**32).map(random.Random))
def test_csv_and_json_lines_in_any_order_give_the_same_rows(folder: Path, rows: Any, rng: random.Random) -> None:
    expected = read_all(folder, write_json_lines(folder / "t.jsonl", rows))
    assert read_all(folder, write_csv(folder / "t.csv", rows)) == expected
    shuffled = rng.sample(rows, len(rows))
    assert read_all(folder, write_csv(folder / "s.csv", shuffled)) == expected
    for split, found in expected.items():
        for row in found:
            check_preferences(row, "test")
            assert split != "test" or row["ranks"]
    # What was given is what is in the rows, counted without the reader's help.
    pairs = [pair for found in expected.values() for row in found for pair in row["pairs"] or ()]
    prompts: dict[str, list[Any]] = {}
    for row in rows:
        prompts.setdefault(row["prompt"], []).append(row)
    if "preferred" in rows[0]:
        wins = Counter((row["prompt"], row["image_b" if row["preferred"] else "image_a"]) for row in rows)
    else:
        score = {(r["prompt"], r["image"]): r["rating"] if "rating" in r else -r["rank"] for r in rows}
        wins = Counter(
            (p, max(a, b, key=lambda i, p=p: score[p, i]))
            for p, its in prompts.items()
            for a, b in combinations([r["image"] for r in its], 2)
            if score[p, a] != score[p, b]
        )
    found_wins: Counter[tuple[str, str]] = Counter()
    for found in expected.values():
        for row in found:
            paths = dict(zip(row["image_ids"], row["archives"], strict=True))
            for pair in row["pairs"] or ():
                found_wins[row["prompt"], paths[pair["ab"[pair["preferred"]]]]] += 1
    assert found_wins == wins and len(pairs) == wins.total()


# --------------------------------------------------------------------------------------------------------------- splits


def test_a_prompt_keeps_its_split_whatever_else_there_is() -> None:
    prompts = [f"prompt {i}" for i in range(4000)]
    splits = {prompt: drawn_split(prompt, **DRAWN) for prompt in prompts}  # type: ignore[arg-type]
    counts = Counter(splits.values())
    for split, share in (("test", 0.3), ("validation", 0.2), ("train", 0.5)):
        assert abs(counts[split] - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5
    assert drawn_split("PROMPT  7", **DRAWN) == splits["prompt 7"]  # type: ignore[arg-type]
    larger = {prompt: drawn_split(prompt, 0, 0.2, 0.4) for prompt in prompts}
    assert all(larger[prompt] == "test" for prompt in prompts if splits[prompt] == "test")
    other = {prompt: drawn_split(prompt, 1, 0.2, 0.3) for prompt in prompts}
    assert other != splits


def test_an_empty_split_is_named(folder: Path) -> None:
    name = write_csv(folder / "t.csv", [{"prompt": "p", "image": "a.png", "rating": 1, "split": "train"}])
    with pytest.raises(SchemaError, match=r"t\.csv: no prompt is in the split test; write some into the column split"):
        list(read_preferences(folder, name, "test", DRAWN))


def test_fractions_that_leave_no_training_data_are_refused() -> None:
    with pytest.raises(ValueError, match="must leave something for training"):
        load({"datasets": {"own": {"validation_fraction": 0.5, "test_fraction": 0.5}}})


# ----------------------------------------------------------------------------------------------------------- bad tables


GOOD = {"prompt": "p", "image": "a.png", "rating": 4}
PAIR = {"prompt": "p", "image_a": "a.png", "image_b": "b.png", "preferred": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD | {"rating": 8}, r"rating must be 1 to 7 \(7 = best\), got 8"),
        (GOOD | {"rating": 0}, "rating must be 1 to 7"),
        (GOOD | {"rating": "good"}, "rating must be a whole number, got 'good'"),
        (GOOD | {"rating": 3.5}, "rating must be a whole number, got 3.5"),
        (GOOD | {"rating": "nan"}, "rating must be a whole number"),
        (GOOD | {"rating": "1e999"}, "rating must be a whole number"),
        (GOOD | {"rating": ""}, "rating is empty; fill it or remove the row"),
        ({"prompt": "p", "image": "a.png", "rank": 0}, r"rank must be 1 or more \(1 = best\), got 0"),
        ({"prompt": "p", "image": "a.png", "rank": 40000}, "rank must be 1 or more"),
        (GOOD | {"prompt": ""}, "prompt is empty"),
        (GOOD | {"prompt_id": "a/b"}, "prompt_id 'a/b' must not contain /"),
        (GOOD | {"split": "dev"}, "split must be one of train, validation, test, got 'dev'"),
        (GOOD | {"split": ""}, "split must be one of"),
        (GOOD | {"image": "nowhere.png"}, "image 'nowhere.png' is no file in .*; correct it or remove the row"),
        (GOOD | {"image": "more"}, "image 'more' is no file in"),
        (GOOD | {"image": "../own.png"}, r"image '\.\./own\.png' leads out of .*; give a path inside"),
        (GOOD | {"image": "more/../a.png"}, "image .* leads out of"),
        (GOOD | {"image": "/etc/hostname"}, "image '/etc/hostname' leads out of"),
        (GOOD | {"image": "out.png"}, "image 'out.png' leads out of"),
        (GOOD | {"image": "circle.png"}, "image 'circle.png' is no file"),
        (GOOD | {"image": "x" * 5000}, "image 'x.*' is no file in"),
        ({"prompt": "p", "image": "a.png", "ratng": 4}, r"column ratng is not known; did you mean rating\?"),
        (GOOD | {"annotator": "me"}, "column annotator is not known; there may be prompt, prompt_id, split, image"),
        ({"prompt": "p", "image": "a.png"}, "column rating or rank is missing: it holds the judgement"),
        ({"image": "a.png", "rating": 3}, "column prompt is missing"),
        ({"prompt": "p", "rating": 3}, "column image is missing"),
        ({"prompt": "p", "image_a": "a.png", "preferred": 1}, "column image_b is missing"),
        (PAIR | {"preferred": 2}, "preferred must be 0 or a, 1 or b, got"),
        (PAIR | {"preferred": ""}, "preferred is empty"),
        (PAIR | {"image_b": "a.png"}, "image_a and image_b are the same"),
    ],
)
@pytest.mark.parametrize("write", [write_csv, write_json_lines])
def test_a_bad_value_is_told_with_file_line_and_column(
    folder: Path, write: Any, row: dict[str, Any], message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name, target in (("out.png", tmp_path_factory.mktemp("outside") / "a.png"), ("circle.png", "circle.png")):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
    file, line = ("bad.csv", 2) if write is write_csv else ("bad.jsonl", 1)
    with pytest.raises(SchemaError, match=rf"{file}, line {line}: {message}"):
        image_files(folder, write(folder / file, [row]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, GOOD | {"rating": 5}], r"line 3: a\.png of prompt_id \S+ stands in .*line 2 too; keep one"),
        (
            [PAIR, PAIR | {"image_a": "b.png", "image_b": "a.png"}],
            r"line 3: a\.png and b\.png of prompt_id \S+ stands in .*line 2 too",
        ),
        (
            [GOOD | {"prompt_id": "1"}, GOOD | {"prompt_id": "1", "prompt": "q", "image": "b.png"}],
            r"line 3: prompt 'q' is not that of .*line 2, which has the same prompt_id 1",
        ),
        (
            [GOOD | {"split": "train"}, GOOD | {"split": "test", "image": "b.png"}],
            r"line 3: split 'test' is not that of .*line 2, which has the same prompt_id",
        ),
    ],
)
def test_rows_that_contradict_each_other_are_told(folder: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        image_files(folder, write_csv(folder / "bad.csv", rows))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.csv", b"", r"bad\.csv: there is no row"),
        ("bad.csv", b"prompt,image,rating\n", r"bad\.csv: there is no row"),
        ("bad.csv", b"prompt,image,rating\np,a.png\n", "line 2: more or fewer cells than the 3 columns; quote commas"),
        ("bad.csv", b"prompt,image,rating\np,q,a.png,3\n", "line 2: more or fewer cells"),
        ("bad.csv", b"prompt,image,image\np,a.png,3\n", "line 1: a column occurs twice"),
        ("bad.csv", b'prompt,image,rating\n"p,a.png,3\n', "is no CSV table in UTF-8"),
        ("bad.csv", "prompt,image,rating\nü,a.png,3\n".encode("latin-1"), "is no CSV table in UTF-8"),
        ("bad.jsonl", b"\n\n", r"bad\.jsonl: there is no row"),
        ("bad.jsonl", b'{"prompt": "p"', "line 1 is no JSON object in UTF-8"),
        ("bad.jsonl", b"[1]\n", r"line 1: must be an object, got \[1\]"),
        ("bad.jsonl", b"[" * 100_000, "line 1 is no JSON object"),
        ("bad.jsonl", b'{"prompt": "\xff"}', "line 1 is no JSON object"),
        ("bad.jsonl", b'{"prompt": 3, "image": "a.png", "rating": 3}', "line 1: prompt must be a text, got 3"),
        ("bad.jsonl", b'{"prompt": "p", "image": "a\\u0000.png", "rating": 3}', "is no file in"),
        ("bad.jsonl", b'{"prompt": "\\ud800", "image": "a.png", "rating": 3}', "prompt must be a text"),
        ("bad.jsonl", b'{"prompt": "p", "image_a": "a.png", "image_b": "b.png", "preferred": true}', "preferred must"),
        (
            "bad.jsonl",
            b'{"prompt": "p", "image": "a.png", "rating": 3}\n{"prompt": "p", "image": "b.png", "rank": 3}',
            "line 2: column rank is here or in the rows before, but not in both",
        ),
        ("bad.parquet", b"PAR1", "cannot be read as Parquet"),
    ],
)
def test_a_broken_table_is_told(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(SchemaError, match=message):
        image_files(folder, name)


# ------------------------------------------------------------------------------------------------- Parquet, and stages


def png(shade: int) -> bytes:
    """Return an encoded image."""
    data = io.BytesIO()
    Image.new("RGB", (30, 30), (0, shade, 0)).save(data, "PNG")
    return data.getvalue()


def record(run_main: Any, folder: Path, name: str, output: Path) -> Path:
    """Run record_own_data and return the record."""
    configured = load({"datasets": {"own": {"folder": str(folder), "annotations": name}}})
    run_main("record_own_data", RecordOwnData.of(configured), record=output / "dataset.json")
    return output / "dataset.json"


def test_the_canonical_format_with_files_and_archives(run_main: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "single").mkdir(parents=True)
    (folder / "single" / "x.png").write_bytes(png(10))
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        archive.writestr("inside/y.png", png(20))
    row = dict.fromkeys(PREFERENCES.names) | {"prompt_id": "1", "prompt": "p", "ranks": [1, 2]}
    row |= {"image_ids": ["x", "y.png"], "archives": ["single/x.png", "all.zip"]}
    write_preferences(folder / "plain.parquet", [row, row | {"prompt_id": "2", "ratings": [3, 4]}])
    table = pq.read_table(folder / "plain.parquet")
    pq.write_table(table.append_column("split", pa.array(["train", "test"])), folder / "split.parquet")
    dataset = record(run_main, folder, "split.parquet", tmp_path)
    assert set(json.loads(dataset.read_text())["files"]) == {"split.parquet", "single/x.png", "all.zip"}
    preferences = tmp_path / "preferences.parquet"
    run_main("read_annotations", ReadAnnotations(dataset="own", split="test"), record=dataset, preferences=preferences)
    (found,) = read_table(preferences, PREFERENCES).to_pylist()
    pairs = [{"a": "x", "b": "y.png", "preferred": 0}]
    assert found == row | {"prompt_id": "2", "ratings": [3, 4], "pairs": pairs}
    images = read_images(run_main, dataset, [found], tmp_path)
    assert {image["image_id"]: image["bytes"] for image in images} == {"x": png(10), "y.png": png(20)}
    assert image_files(folder, "plain.parquet") == ["all.zip", "single/x.png"]
    for bad, message in (
        (row | {"archives": ["../data/single/x.png", "all.zip"]}, "row 0: archives .* leads out of"),
        (row | {"ranks": None}, "row 0: holds neither ratings nor ranks nor pairs"),
    ):
        write_preferences(folder / "bad.parquet", [bad])
        with pytest.raises(SchemaError, match=message):
            image_files(folder, "bad.parquet")


def read_images(run_main: Any, dataset: Path, rows: list[dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """Run read_images for these rows."""
    from workflow_scripts.files.records import file_record
    from workflow_scripts.files.writing import write_json
    from workflow_scripts.running.provenance import sidecar_path

    subset = output / "subset.parquet"
    write_preferences(subset, [row | {"position": i} for i, row in enumerate(rows)], SUBSET)
    sidecar = {"config": {}, "inputs": {}, "outputs": {subset.name: file_record(subset)}, "warnings": []}
    write_json(sidecar_path(subset), sidecar | {"mlflow_run_id": None})
    config = ReadImages(dataset="own", split="test", shard=0, start=0, stop=None)
    files = {"images": output / "images.parquet", "listing": output / "images.json"}
    run_main("read_images", config, record=dataset, subset=subset, **files)
    return read_table(output / "images.parquet", IMAGES).to_pylist()


def test_unreadable_images_are_left_out_and_listed(run_main: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, data in {"a.png": png(1), "b.png": png(2), "c.png": png(3)[:60], "d.txt": b"text"}.items():
        (folder / name).write_bytes(data)
    rows = [{"prompt": "p", "image": n, "rank": i + 1} for i, n in enumerate(("a.png", "b.png", "c.png", "d.txt"))]
    name = write_csv(folder / "t.csv", [row | {"split": "test"} for row in rows])
    dataset = record(run_main, folder, name, tmp_path)
    canonical = list(read_preferences(folder, name, "test", DRAWN))
    images = read_images(run_main, dataset, canonical, tmp_path)
    assert {image["image_id"] for image in images} == {"a.png", "b.png"}
    listing = json.loads((tmp_path / "images.json").read_text())
    assert (listing["wanted"], listing["read"]) == (4, 2)
    assert set(listing["unreadable"]) == {"c.png", "d.txt"}


def test_files_that_changed_since_the_record_are_named(run_main: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(1))
    name = write_csv(folder / "t.csv", [{"prompt": "p", "image": "a.png", "rank": 1, "split": "test"}])
    dataset = record(run_main, folder, name, tmp_path / "downloads")
    canonical = list(read_preferences(folder, name, "test", DRAWN))
    (folder / "a.png").write_bytes(png(2))
    remedy = r"is not as it was when .*dataset\.json was written; restore it, or delete .*dataset\.json and run"
    with pytest.raises(ProvenanceError, match=rf"{re.escape(str(folder / 'a.png'))} {remedy}"):
        read_images(run_main, dataset, canonical, tmp_path)
    write_csv(folder / "t.csv", [{"prompt": "q", "image": "a.png", "rank": 1, "split": "test"}])
    config = ReadAnnotations(dataset="own", split="test")
    with pytest.raises(ProvenanceError, match=rf"t\.csv {remedy}"):
        run_main("read_annotations", config, record=dataset, preferences=tmp_path / "preferences.parquet")
