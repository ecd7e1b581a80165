"""Reader of ImageRewardDB's published layout: metadata-{split}.parquet and images/{split}/{split}_{i}.zip.

The layout follows the data set card and the loading script of zai-org/ImageRewardDB.
"""

import logging
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from workflow_scripts.configuration.model import Split
from workflow_scripts.preferences.archives import member_names
from workflow_scripts.preferences.schema import SchemaError, image_name, reading_parquet, text, whole_number

log = logging.getLogger("softpref")

RATINGS = {  # published name to canonical name
    "overall_rating": "ratings",
    "image_text_alignment_rating": "alignment_ratings",
    "fidelity_rating": "fidelity_ratings",
}
COLUMNS = ["image_path", "prompt_id", "prompt", "rank", *RATINGS]


def annotation_file(split: Split) -> str:
    """File with the annotations of a split, relative to the download folder."""
    return f"metadata-{split}.parquet"


def read_preferences(folder: Path, split: Split, files: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the canonical rows of a split, one for each prompt_id, in order of first occurrence; read no image.

    Images whose archive was not downloaded are left out (a smaller published training set is a prefix of the
    archives), and so are repeated rows.

    Args:
        folder: download folder.
        split: train, validation or test.
        files: downloaded files relative to `folder`.

    Raises:
        SchemaError: the file cannot be read, a column is missing, a value is of another type, or rows of one image or
            one prompt contradict each other.
        ArchiveError: an archive whose list of images is needed cannot be read.
    """
    path = folder / annotation_file(split)
    prompts: dict[str, dict[str, dict[str, Any]]] = {}
    repeated = absent = 0
    listed: dict[str, str] = {}
    for row in _metadata(path, split):
        images = prompts.setdefault(row["prompt_id"], {})
        name = row["image"]
        archive = f"{row.pop('folder')}.zip"
        if archive not in files:
            listed = listed or archive_of_images(folder, split, files)
            archive = listed.get(name, "")
        if not archive:
            absent += 1
            continue
        entry = {**row, "archive": archive}
        repeated += name in images
        if images.setdefault(name, entry) != entry or row["prompt"] != next(iter(images.values()))["prompt"]:
            raise SchemaError(
                f"{path}: rows of prompt_id {row['prompt_id']} contradict each other at image {name}; "
                "use another revision of the data set (datasets.imagereward.hub.revision)"
            )
    if repeated or absent:
        log.info("%s: left out %d repeated rows and %d of archives not downloaded", path.name, repeated, absent)
    for prompt_id, images in prompts.items():
        if not images:
            continue
        rows = list(images.values())
        yield {
            "prompt_id": prompt_id,
            "prompt": rows[0]["prompt"],
            "image_ids": list(images),
            "archives": [row["archive"] for row in rows],
            "ranks": [row["rank"] for row in rows],
            **{canonical: [row[published] for row in rows] for published, canonical in RATINGS.items()},
            "pairs": None,
            "annotations": None,
        }


def _metadata(path: Path, split: Split) -> Iterator[dict[str, Any]]:
    """Yield the rows of the metadata with every value checked."""
    with reading_parquet(path):
        names = pq.read_schema(path).names
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise SchemaError(f"{path}: column {missing[0]} is missing; is this ImageRewardDB's metadata of {split}?")
    for number, row in enumerate(_rows(path)):
        where = f"{path}, row {number}"
        yield {
            "image": image_name(row["image_path"], where),
            "folder": str(PurePosixPath(row["image_path"]).parent),
            **{name: text(row[name], name, where) for name in ("prompt_id", "prompt")},
            **{name: whole_number(row[name], name, where) for name in ("rank", *RATINGS)},
        }


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with reading_parquet(path), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=COLUMNS):
            yield from batch.to_pylist()


def archive_of_images(folder: Path, split: Split, files: Collection[str]) -> dict[str, str]:
    """Look up the archive of each image in the archives, for metadata whose paths do not name it."""
    archives = [name for name in sorted(files) if name.startswith(f"images/{split}/") and name.endswith(".zip")]
    found: dict[str, str] = {}
    for name in archives:
        found |= {PurePosixPath(member).name: name for member in member_names(folder / name)}
    return found
