"""Ranking of image files by the thousand: what is finished is kept through a kill, memory does not grow with pixels.

Images are decoded twice, never all at once: to find out which can be read and what they are named (by their pixels),
and when they are asked about. Judgements go to a small database beside the output, part by part, and from there to
the three files. The database is removed when these are written.
"""

import contextlib
import csv
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from workflow_scripts.files.digests import digest
from workflow_scripts.files.writing import replacing
from workflow_scripts.preferences.images import UnreadableImageError, decoded
from workflow_scripts.ranking.judge import Judge, image_name, ranks_of
from workflow_scripts.ranking.listing import Listed
from workflow_scripts.ranking.page import write_page
from workflow_scripts.running.locks import Lock

Row = dict[str, Any]
ALONE = "it is the only readable image of its prompt, and the policy compares images"
LONG = "the question with this prompt is longer than the policy's context"


class Found(NamedTuple):
    """A listed image that was looked at."""

    listed: Listed
    name: str | None
    """Digest of its pixels; none where it cannot be read."""
    pixels: int
    problem: str | None
    """Why it cannot be read."""


class Outputs(NamedTuple):
    """Where a ranking is written."""

    table: Path
    """CSV: one line for each image."""
    rows: Path
    """JSON lines: the same with the distribution of the answers and every thought."""
    page: Path
    """HTML: one file with the images in their order."""

    @property
    def unfinished(self) -> Path:
        """Database of what is finished while the rest is not."""
        return self.table.with_name(f".{self.table.stem}.unfinished.sqlite")


def rank_files(judge: Judge, listed: list[Listed], outputs: Outputs) -> dict[str, int]:
    """Rank the images of each prompt and write the three files.

    The order of the list decides about the order of the prompts in the files, and about nothing else. After a kill the
    same call goes on with what is missing; with other settings, other images or other prompts it begins anew.

    Returns:
        Numbers of images, of prompts, and of images without a score.

    Raises:
        LockedError: another process is writing the same files.
    """
    outputs.table.parent.mkdir(parents=True, exist_ok=True)
    refusal = f"{outputs.table} is being made by another process; wait for it or end it, or choose another output"
    with Lock(outputs.table.with_name(f".{outputs.table.name}.ranking.lock"), refusal):
        found = [look(one) for one in tqdm(listed, "looking at images", unit="image", disable=None)]
        with contextlib.closing(sqlite3.connect(outputs.unfinished)) as store:
            judge_all(judge, found, store)
            counts = {"images": len(found), "prompts": len({one.listed.prompt for one in found}), "without_score": 0}
            with contextlib.ExitStack() as files:
                temporary = [files.enter_context(replacing(path)) for path in outputs]
                table, rows = (
                    files.enter_context(path.open("w", encoding="utf-8", newline="")) for path in temporary[:2]
                )
                answers = [str(answer) for answer in judge.policy.answers]
                columns = ["prompt", "rank", "score", "standard_error", "path", "forced_share"]
                writer = csv.writer(table, lineterminator="\n")
                writer.writerow([*columns, *(f"p{answer}" for answer in answers), "problem"])

                def written() -> Iterator[tuple[Row, Path]]:
                    for row, path in ranked(found, store, judge.protocol == "pairwise"):
                        shares = [row["distribution"].get(answer) for answer in answers]
                        values = [*(row[name] for name in columns), *shares, row["problem"]]
                        writer.writerow([f"{v:.6f}" if isinstance(v, float) else v for v in values])
                        rows.write(json.dumps(row, ensure_ascii=False) + "\n")
                        counts["without_score"] += row["problem"] is not None
                        yield row, path

                write_page(temporary[2], written(), judge, len(found))
        outputs.unfinished.unlink()
    return counts


def look(one: Listed) -> Found:
    """Decode an image to find out its name, or why it cannot be shown."""
    try:
        image = decoded(one.path.read_bytes())
    except (OSError, ValueError) as error:  # UnreadableImageError, or a path that can be none
        reason = error.strerror if isinstance(error, OSError) else error
        return Found(one, None, 0, f"unreadable: {reason}")
    return Found(one, image_name(image), image.width * image.height, None)


def judge_all(judge: Judge, found: list[Found], store: sqlite3.Connection) -> None:
    """Ask about all images that the store has no judgement of, part by part."""
    prompts: dict[str, dict[str, int]] = {}
    paths: dict[str, Path] = {}
    for one in found:
        if one.name:
            prompts.setdefault(one.listed.prompt, {})[one.name] = one.pixels
            paths.setdefault(one.name, one.listed.path)
    chunks = judge.chunks(prompts)
    run = digest(judge.settings + " ".join(item.item_id for chunk in chunks for item in chunk))
    store.execute("CREATE TABLE IF NOT EXISTS parts (run TEXT, part INTEGER, PRIMARY KEY (run, part))")
    columns = "run TEXT, prompt TEXT, image TEXT, score REAL, judgement TEXT, PRIMARY KEY (run, prompt, image)"
    store.execute(f"CREATE TABLE IF NOT EXISTS judgements ({columns})")
    for name in ("parts", "judgements"):
        store.execute(f"DELETE FROM {name} WHERE run != ?", [run])
    store.commit()
    finished = {part for (part,) in store.execute("SELECT part FROM parts")}
    asked = sum(map(len, chunks))
    with tqdm(total=asked, desc="asking", unit="question", disable=None) as bar:
        for part, chunk in enumerate(chunks):
            if part not in finished:
                names = {name for item in chunk for name in item.image_ids}
                images = {name: as_found(paths[name], name) for name in names}
                for (prompt, image), judgement in judge.answers(chunk, images).items():
                    values = (run, prompt, image, judgement.score, json.dumps(asdict(judgement), ensure_ascii=False))
                    store.execute("INSERT OR REPLACE INTO judgements VALUES (?, ?, ?, ?, ?)", values)
                store.execute("INSERT INTO parts VALUES (?, ?)", (run, part))
                store.commit()
            bar.update(len(chunk))


def as_found(path: Path, name: str) -> Image.Image:
    """The image of a file, still the one that was looked at.

    Raises:
        ChangedImageError: it is another one now.
    """
    try:
        image = decoded(path.read_bytes())
    except (OSError, UnreadableImageError):
        image = None
    if image is None or image_name(image) != name:
        raise ChangedImageError(f"{path} was changed while images were ranked; run the same command again")
    return image


class ChangedImageError(RuntimeError):
    """A file is not what it was a moment ago."""


def ranked(found: list[Found], store: sqlite3.Connection, pairwise: bool) -> Iterator[tuple[Row, Path]]:
    """A row for each image with its path, by prompt and rank; those without a score come last of their prompt."""
    groups: dict[str, list[Found]] = {}
    for one in found:
        groups.setdefault(one.listed.prompt, []).append(one)
    for prompt, group in groups.items():
        key = digest(prompt)
        scores = dict(store.execute("SELECT image, score FROM judgements WHERE prompt = ?", [key]).fetchall())
        scored = sorted((one for one in group if one.name in scores), key=lambda one: one.listed.name)
        ranks = ranks_of([scores[one.name] for one in scored])
        for rank, one in sorted(zip(ranks, scored, strict=True), key=lambda pair: (pair[0], pair[1].listed.name)):
            ((judgement,),) = store.execute(
                "SELECT judgement FROM judgements WHERE prompt = ? AND image = ?", [key, one.name]
            )
            yield _row(one, rank, json.loads(judgement), None), one.listed.path
        alone = pairwise and len({one.name for one in group if one.name}) < 2
        for one in sorted((one for one in group if one.name not in scores), key=lambda one: one.listed.name):
            yield _row(one, None, {}, one.problem or (ALONE if alone else LONG)), one.listed.path


def _row(one: Found, rank: int | None, judgement: dict[str, Any], problem: str | None) -> Row:
    return {
        "prompt": one.listed.prompt,
        "path": one.listed.name,
        "image": one.name,
        "rank": rank,
        "score": judgement.get("score"),
        "standard_error": judgement.get("standard_error"),
        "forced_share": judgement.get("forced_share"),
        "distribution": judgement.get("distribution", {}),
        "thoughts": judgement.get("thoughts", []),
        "problem": problem,
    }
