"""Read the images of selected prompts out of the published archives, and no others.

python -m workflow_scripts.stages.read_images --record results/downloads/imagereward/dataset.json \
    --subset results/datasets/imagereward/test/subset.parquet \
    --output results/datasets/imagereward/test/images-0000.parquet \
    --listing results/datasets/imagereward/test/images-0000.json \
    --config '{"dataset": "imagereward", "split": "test", "shard": 0, "start": 0, "stop": 500}'

Images that cannot be decoded, or not be shown to the policy, are left out and listed with the reason.
"""

import json
from collections import Counter, defaultdict
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
    """Read the images of selected prompts out of the published archives, and no others."""

    record: Input
    """dataset.json of the data set; it says where the raw files are."""
    subset: Input
    """subset.parquet: the selected prompts."""
    output: Output
    """images-*.parquet: the encoded images."""
    listing: Output
    """JSON: how many images are wanted and read, which are unreadable (with the reason) and which are missing."""
    config: ReadImages
    """Which prompts, by their position in the subset."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    with run_stage(arguments) as run:
        config = arguments.config
        wanted: dict[str, set[str]] = defaultdict(set)
        for row in read_table(arguments.subset, SUBSET).select(["position", "image_ids", "archives"]).to_pylist():
            if row["position"] >= config.start and (config.stop is None or row["position"] < config.stop):
                for image_id, archive in zip(row["image_ids"], row["archives"], strict=True):
                    wanted[archive].add(image_id)
        times = Counter(name for names in wanted.values() for name in names)
        if twice := [name for name, number in times.items() if number > 1]:
            raise SchemaError(
                f"{arguments.subset}: image {twice[0]} is listed in two archives, and images are known by their names "
                "alone; use another revision of the data set"
            )
        record = json.loads(arguments.record.read_text(encoding="utf-8"))
        archives = {checked_raw_file(name, record, arguments.record): names for name, names in wanted.items()}

        unreadable: dict[str, str] = {}
        rows = tqdm(stream_images(archives, unreadable), "reading images", len(times), unit="image", mininterval=10)
        read = write_images(arguments.output, rows)
        everything = set(times)
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


def stream_images(archives: dict[Path, set[str]], unreadable: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Rows of IMAGES archive by archive; an image that cannot be decoded goes to `unreadable` with the reason.

    Args:
        archives: names of the images that are wanted, by archive (or file of one image).
        unreadable: is filled.
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
