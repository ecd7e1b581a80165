"""One HTML file with ranked images in their order, scores and reasoning; it needs no other file and no network."""

import base64
import io
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from workflow_scripts.preferences.images import decoded
from workflow_scripts.ranking.judge import Judge

PAGE_IMAGES = 1000  # about 8 MB of thumbnails; the other two files have every image
THUMBNAIL = (256, 256)
TEMPLATES = Path(__file__).with_name("templates")


def write_page(path: Path, rows: Iterable[tuple[dict[str, Any], Path]], judge: Judge, images: int) -> None:
    """Write the page, row by row.

    Args:
        path: the HTML file.
        rows: for each image a row as in the JSON lines file and the image's path; those of a prompt together.
        judge: who has judged.
        images: their number.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pairwise = judge.protocol == "pairwise"
    pieces = environment.get_template("ranking.html.jinja").generate(
        images=images,
        pairwise=pairwise,
        both_orders=judge.both_orders,
        k=judge.k,
        seed=judge.seed,
        sections=groupby(cards(rows), key=lambda card: card[0]["prompt"]),
        names={"0": "anchor", "1": "this image"} if pairwise else {},
        left_out=max(0, images - PAGE_IMAGES),
    )
    with path.open("w", encoding="utf-8") as file:
        file.writelines(pieces)


def cards(rows: Iterable[tuple[dict[str, Any], Path]]) -> Iterator[tuple[dict[str, Any], str | None]]:
    """The first rows, as many as the page holds, each with its thumbnail where the image could be read."""
    for number, (row, image) in enumerate(rows):
        if number < PAGE_IMAGES:
            yield row, thumbnail(decoded(image.read_bytes())) if row["image"] else None


def thumbnail(image: Image.Image) -> str:
    """A small copy of an image as an address that holds all of it."""
    small = image.copy()
    small.thumbnail(THUMBNAIL)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
