"""What is to be ranked: prompts with paths of images, from a table, a folder or a list of files."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from workflow_scripts.files.paths import ROOT, from_here

COLUMNS = ("prompt", "path")
EXTENSIONS = (".webp", ".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff")


class ListingError(ValueError):
    """What is to be ranked cannot be found: names file or row and the remedy."""


class Listed(NamedTuple):
    """One image to be ranked for one prompt."""

    prompt: str
    path: Path
    name: str
    """The path as it was given, as text that can be shown: what is not Unicode is replaced."""


def listed_table(table: Path) -> list[Listed]:
    """Rows of a CSV file with the columns prompt and path; others are left alone.

    Paths are relative to the table's folder.

    Raises:
        ListingError: no such file, no such columns, no rows, or a row without prompt or path.
    """
    rows = []
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise ListingError(
                    f"{table} has no column {missing[0]}, but {reader.fieldnames or 'nothing'}; its first line must "
                    f"name the columns {' and '.join(COLUMNS)}, with commas between them"
                )
            for row in reader:
                prompt, path = (row[name] for name in COLUMNS)
                if not prompt or not prompt.strip() or not path:
                    raise ListingError(f"{table}, line {reader.line_num}: prompt or path is empty; fill in both")
                rows.append(Listed(prompt, table.parent / path, path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ListingError(f"{table} cannot be read as CSV in UTF-8: {error}") from None
    if not rows:
        raise ListingError(f"{table} has no row below its first line; add prompts and paths of images")
    return rows


def listed(images: Path, prompt: str) -> list[Listed]:
    """Images of a CSV, or of a folder for one prompt; named as the CSV does, or from the folder on.

    Raises:
        ListingError: as `listed_table` or `listed_files`.
    """
    if images.suffix == ".csv":
        return listed_table(images)
    return [one._replace(name=shown_name(one.path.relative_to(images))) for one in listed_files([images], prompt)]


def ranked_images(images: str, prompt: str) -> list[str]:
    """Files to rank as inputs of a rule: the table, and the images that are there; none where nothing is to be ranked.

    Args:
        images: key `ranking.images`, a CSV or a folder relative to the repository, or empty.
        prompt: key `ranking.prompt`, for a folder.
    """
    if not images:
        return []
    given = ROOT / images
    paths = {one.path for one in listed(given, prompt)}
    return from_here([*([given] if given.is_file() else []), *sorted(path for path in paths if path.is_file())])


def listed_files(paths: Sequence[Path], prompt: str) -> list[Listed]:
    """Files, and the images in folders, for one prompt; of a folder all files below it with an image's extension.

    Raises:
        ListingError: a path is not there, or there is no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += images_in(path)
        elif path.is_file():
            found.append(path)
        else:
            raise ListingError(f"{shown_name(path)} is not there; name image files or folders of images")
    if not prompt.strip() or any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ListingError("the prompt is empty or not UTF-8; say what the images are of")
    if not found:
        raise ListingError(
            f"there is no image in {', '.join(map(shown_name, paths)) or 'nothing'}; name files, or folders with files "
            f"that end in {', '.join(EXTENSIONS)}"
        )
    return [Listed(prompt, path, shown_name(path)) for path in found]


def images_in(folder: Path) -> list[Path]:
    """Files below a folder with an image's extension, in the order of their names; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
    )


def shown_name(path: Path) -> str:
    """A path as text that can be written and shown: bytes that are not UTF-8 and control characters are replaced."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
