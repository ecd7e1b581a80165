"""Ranking of files: odd ones among them, thousands of them, killed in the middle; the page."""

import contextlib
import csv
import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from workflow_scripts.files.paths import ROOT
from workflow_scripts.ranking.judge import Judge
from workflow_scripts.ranking.listing import ListingError, listed, listed_files, listed_table
from workflow_scripts.ranking.ranked_files import Outputs, rank_files

Scenes = list[tuple[str, dict[str, Image.Image]]]


def outputs_in(folder: Path) -> Outputs:
    """Names of the three files."""
    return Outputs(*(folder / f"ranking.{ending}" for ending in ("csv", "jsonl", "html")))


def rows_of(outputs: Outputs) -> list[dict[str, Any]]:
    """Rows of the JSON lines file."""
    return [json.loads(line) for line in outputs.rows.read_text(encoding="utf-8").splitlines()]


def dots(folder: Path, count: int) -> Path:
    """A folder of small pictures, no two alike."""
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return folder


class Elements(HTMLParser):
    """Elements of a page with their attributes, and its text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


# --------------------------------------------------------------------------------------------------------- what is odd


@pytest.fixture
def odd(tmp_path: Path, scenes: Scenes) -> Path:
    """Return a table of odd images, beside them."""
    folder = tmp_path / "bilder"
    first, second, third, fourth = scenes[0][1].values()
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    first.save(folder / "a/same name.png")
    second.save(folder / "b/same name.png")
    third.resize((900, 90)).save(folder / "größe 比.webp")
    fourth.convert("LA").save(folder / "<script>alert(1)</script>.png".replace("/", "⁄"))
    fourth.rotate(90).save(folder / "fourth.gif")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes((folder / "a/same name.png").read_bytes()[:300])
    Image.new("RGB", (900, 3)).save(folder / "line.png")
    names = [str(path.relative_to(tmp_path)) for path in sorted(folder.rglob("*")) if path.is_file()]
    with (tmp_path / "odd.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["note", "prompt", "path"])
        writer.writerows(["x", '<b>two</b> "red" circles & <think>', name] for name in [*names, "missing.png"])
    return tmp_path / "odd.csv"


@pytest.mark.parametrize("track", ["imagereward", "hpsv2"])
def test_odd_images_are_ranked_or_told(odd: Path, judge_of: Callable[..., Judge], tmp_path: Path, track: str) -> None:
    outputs = outputs_in(tmp_path / "out")
    judge = judge_of(track, k=2)
    counts = rank_files(judge, listed_table(odd), outputs)
    rows = rows_of(outputs)
    assert counts == {"images": 9, "prompts": 1, "without_score": 4} and len(rows) == 9
    ranked = [row for row in rows if row["problem"] is None]
    assert {Path(row["path"]).name for row in ranked} > {"größe 比.webp", "same name.png", "fourth.gif"}
    assert len({row["score"] for row in ranked if Path(row["path"]).name == "same name.png"}) == 2
    assert [row["score"] for row in ranked] == sorted((row["score"] for row in ranked), reverse=True)
    told = {Path(row["path"]).name: row["problem"] for row in rows if row["problem"]}
    assert told.keys() == {"empty.png", "cut.png", "line.png", "missing.png"}
    assert told["empty.png"] == "unreadable: empty" and "narrower than 200:1" in told["line.png"]
    assert told["missing.png"] == "unreadable: No such file or directory"
    images = [Image.open(odd.parent / row["path"]) for row in ranked]
    assert [row.score for row in judge.rank(rows[0]["prompt"], images)] == [row["score"] for row in ranked]
    with outputs.table.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["path"], row["problem"] or None) for row in table] == [(row["path"], row["problem"]) for row in rows]
    assert [float(row["score"]) for row in table[:5]] == pytest.approx([row["score"] for row in ranked], abs=1e-6)
    assert not list(outputs.table.parent.glob(".*"))


def test_the_page_shows_texts_as_texts(odd: Path, judge_of: Callable[..., Judge], tmp_path: Path) -> None:
    outputs = outputs_in(tmp_path / "out")
    judge = judge_of("imagereward", k=2)
    thought = {"reasoning": "</blockquote><img src=x onerror=alert(1)>", "score": 4.0, "answer": 4, "forced": False}

    class Mischievous(Judge):
        def answers(self, chunk: Any, images: Any) -> Any:
            found = super().answers(chunk, images)
            said = dataclasses.replace(next(iter(found.values())).thoughts[0], reasoning=thought["reasoning"])
            return {name: dataclasses.replace(judgement, thoughts=[said]) for name, judgement in found.items()}

    fields = {field.name: getattr(judge, field.name) for field in dataclasses.fields(judge)}
    rank_files(Mischievous(**fields), listed_table(odd), outputs)
    page = Elements(outputs.page)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b", "link", "think"})
    assert '<b>two</b> "red" circles & <think>' in page.text and "größe 比.webp" in page.text
    assert page.text.count(str(thought["reasoning"])) == 5
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5 and all(str(image["src"]).startswith("data:image/webp;base64,") for image in images)
    assert [image["alt"] for image in images] == [
        f"{row['path']}, rank {row['rank']}" for row in rows_of(outputs) if row["rank"]
    ]
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]


def test_a_single_image_has_nothing_to_be_compared_with(judge_of: Callable[..., Judge], tmp_path: Path) -> None:
    folder, outputs = dots(tmp_path / "one", 1), outputs_in(tmp_path)
    assert rank_files(judge_of("hpsv2", k=2), listed_files([folder], "a red circle"), outputs)["without_score"] == 1
    assert "the only readable image of its prompt" in rows_of(outputs)[0]["problem"]
    assert rank_files(judge_of("imagereward", k=2), listed_files([folder], "a red circle"), outputs)["images"] == 1
    assert rows_of(outputs)[0]["rank"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,image\na,b.png\n", "has no column path, but \\['prompt', 'image'\\]"),
        (b"", "has no column prompt, but nothing"),
        (b"prompt,path\n", "has no row below its first line"),
        (b"prompt,path\nred,a.png\n,b.png\n", "line 3: prompt or path is empty"),
        (b"prompt,path\nred\n", "line 2: prompt or path is empty"),
        (b"prompt,path\nr\xffd,a.png\n", "cannot be read as CSV in UTF-8"),
    ],
)
def test_a_wrong_table_is_told(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ListingError, match=message):
        listed_table(tmp_path / "t.csv")


def test_lists_of_files(tmp_path: Path) -> None:
    folder = dots(tmp_path / "f", 3)
    (folder / "notes.txt").touch()
    (folder / ".hidden.png").touch()
    (tmp_path / "t.csv").write_text("\ufeffprompt,path\nred,f/0001.png\n", encoding="utf-8")
    assert [one.name for one in listed(folder, "red")] == ["0000.png", "0001.png", "0002.png"]
    assert [(one.name, one.path) for one in listed(tmp_path / "t.csv", "")] == [("f/0001.png", folder / "0001.png")]
    odd_name = Path(os.fsdecode(bytes(folder) + b"/\xff\x1b[31m.png"))
    odd_name.touch()
    assert listed_files([odd_name], "red")[0].name == f"{folder}/\ufffd\ufffd[31m.png"
    for paths, prompt, message in (
        ([tmp_path / "no.png"], "red", "is not there"),
        ([folder], " ", "the prompt is empty"),
        ([folder], "\udcff", "not UTF-8"),
        ([tmp_path / "g"], "red", "there is no image in"),
    ):
        (tmp_path / "g").mkdir(exist_ok=True)
        with pytest.raises(ListingError, match=message):
            listed_files(paths, prompt)


# ------------------------------------------------------------------------------------------------------ killed, resumed


@contextlib.contextmanager
def counted(judge: Judge) -> Iterator[tuple[Judge, list[int]]]:
    """Yield a judge that notes how many questions it is asked at a time."""
    asked: list[int] = []

    class Counting(Judge):
        def answers(self, chunk: Any, images: Any) -> Any:
            asked.append(len(chunk))
            return super().answers(chunk, images)

    yield Counting(**{field.name: getattr(judge, field.name) for field in dataclasses.fields(judge)}), asked


def finished_parts(store: Path) -> int:
    """Parts that an unfinished ranking has kept."""
    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(store)) as database:
        return int(database.execute("SELECT count(*) FROM parts").fetchone()[0])
    return 0


def test_a_killed_ranking_goes_on(policy_folders: Path, judge_of: Callable[..., Judge], tmp_path: Path) -> None:
    folder = dots(tmp_path / "dots", 40)
    killed, whole = outputs_in(tmp_path / "killed"), outputs_in(tmp_path / "whole")
    killed.table.parent.mkdir()
    command = [sys.executable, "-m", "workflow_scripts", "rank", "--prompt", "a red circle", str(folder)]
    command += ["--policy", str(policy_folders / "hpsv2/seed0"), "-k", "2", "--batch", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [*command, "--output", str(killed.table.with_suffix(""))]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while process.poll() is None and finished_parts(killed.unfinished) < 3:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        said = process.communicate()
    kept = finished_parts(killed.unfinished)
    assert process.returncode == -signal.SIGKILL and 3 <= kept < 10 and not killed.table.exists(), said
    images = listed_files([folder], "a red circle")
    with counted(judge_of("hpsv2", k=2, batch=4)) as (judge, asked):
        rank_files(judge, images, killed)
        assert len(asked) == 10 - kept and sum(asked) <= 4 * len(asked)
        asked.clear()
        rank_files(judge, images[::-1], whole)
        assert len(asked) == 10 and sum(asked) == 39
    for name in whole._fields:
        assert getattr(killed, name).read_bytes() == getattr(whole, name).read_bytes(), name
    assert not killed.unfinished.exists()


def test_other_settings_do_not_mix(judge_of: Callable[..., Judge], tmp_path: Path) -> None:
    images = listed_files([dots(tmp_path / "dots", 8)], "a red circle")
    mixed, pure = outputs_in(tmp_path / "mixed"), outputs_in(tmp_path / "pure")

    class Stopped(Exception):  # noqa: N818
        pass

    class Stopping(Judge):
        def answers(self, chunk: Any, images: Any) -> Any:
            if finished_parts(mixed.unfinished):
                raise Stopped
            return super().answers(chunk, images)

    first, second = judge_of("imagereward", k=2, batch=4), judge_of("imagereward", k=1, batch=4)
    with pytest.raises(Stopped):
        rank_files(Stopping(**{f.name: getattr(first, f.name) for f in dataclasses.fields(first)}), images, mixed)
    assert finished_parts(mixed.unfinished) == 1
    with counted(second) as (judge, asked):
        rank_files(judge, images, mixed)
        assert asked == [4, 4]
    rank_files(second, images, pure)
    assert mixed.rows.read_bytes() == pure.rows.read_bytes()
