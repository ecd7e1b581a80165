"""Read the images of selected prompts from the published archives, and no others.

python -m workflow_scripts.stages.read_images --record results/downloads/imagereward/dataset.json \
    --subset results/datasets/imagereward/test/subset.parquet \
    --images results/datasets/imagereward/test/images-0000.parquet \
    --listing results/datasets/imagereward/test/images-0000.json \
    --config '{"dataset": "imagereward", "split": "test", "shard": 0, "start": 0, "stop": 500}'

Images that cannot be decoded or shown to the policy are left out and listed with the reason.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from workflow_scripts.configuration.data_stages import ReadImages
from workflow_scripts.files.records import checked_raw_file
from workflow_scripts.files.writing import write_json
from workflow_scripts.preferences.archives import ArchiveError, iter_images
from workflow_scripts.preferences.images import UnreadableImageError, decoded
from workflow_scripts.preferences.schema import SUBSET, SchemaError, read_table, write_images
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Read the images of selected prompts from the published archives, and no others."""

    record: Input
    """dataset.json of the data set, which names the raw files."""
    subset: Input
    """subset.parquet: the selected prompts."""
    images: Output
    """images-*.parquet: the encoded images."""
    listing: Output
    """JSON: numbers of wanted and read images, unreadable ones (with the reason) and missing ones."""
    config: ReadImages
    """Positions in the subset."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    with run_stage(arguments) as run:
        wanted = wanted_images(arguments.subset, arguments.config)
        everything = {image_id for names in wanted.values() for image_id in names}
        record = json.loads(arguments.record.read_text(encoding="utf-8"))
        archives = {checked_raw_file(name, record, arguments.record): names for name, names in wanted.items()}

        unreadable: dict[str, str] = {}
        rows = tqdm(
            stream_images(archives, unreadable), "reading images", len(everything), unit="image", mininterval=10
        )
        read = write_images(arguments.images, rows)
        missing = sorted(everything - read - unreadable.keys())
        if 2 * len(read) < len(everything):
            raise ArchiveError(
                f"only {len(read)} of {len(everything)} images can be read ({len(unreadable)} unreadable, "
                f"{len(missing)} missing, such as {[*unreadable.items(), *missing][:3]}); "
                f"make {arguments.record} and its files anew"
            )
        counts = {"wanted": len(everything), "read": len(read)}
        write_json(arguments.listing, counts | {"unreadable": unreadable, "missing": missing})
        run.metrics({**counts, "unreadable": len(unreadable), "missing": len(missing)})
        if unreadable or missing:
            run.warn(f"{len(unreadable)} images are unreadable and {len(missing)} missing; see {arguments.listing}")


def wanted_images(subset: Path, config: ReadImages) -> dict[str, set[str]]:
    """Return the image_ids of the selected prompts by archive.

    Raises:
        SchemaError: an image is listed in two archives.
    """
    wanted: dict[str, set[str]] = defaultdict(set)
    archive_of: dict[str, str] = {}
    for row in read_table(subset, SUBSET).select(["position", "image_ids", "archives"]).to_pylist():
        if row["position"] < config.start or (config.stop is not None and row["position"] >= config.stop):
            continue
        for image_id, archive in zip(row["image_ids"], row["archives"], strict=True):
            if archive_of.setdefault(image_id, archive) != archive:
                raise SchemaError(
                    f"{subset}: image {image_id} is listed in two archives, and images are known by their names "
                    "alone; use another revision of the data set"
                )
            wanted[archive].add(image_id)
    return wanted


def stream_images(archives: dict[Path, set[str]], unreadable: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield rows of IMAGES, archive by archive; list images that cannot be decoded in `unreadable`.

    Args:
        archives: image_ids of the wanted images by archive (or file of one image).
        unreadable: is filled with reasons by image_id.
    """
    for archive, names in sorted(archives.items()):
        for image_id, data in iter_images(archive, names):
            try:
                if isinstance(data, UnreadableImageError):
                    raise data
                image = decoded(data)
            except UnreadableImageError as error:
                unreadable[image_id] = str(error)
            else:
                yield {"image_id": image_id, "bytes": data, "width": image.width, "height": image.height}


if __name__ == "__main__":
    main()
