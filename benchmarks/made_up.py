"""Generate files of any size in the real layouts and schemas: annotations, archives, rollouts."""

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from workflow_scripts.files.records import file_record
from workflow_scripts.files.writing import write_json
from workflow_scripts.preferences.schema import SUBSET, write_preferences
from workflow_scripts.preferences.synthetic_layouts import IMAGE_COUNTS, METADATA
from workflow_scripts.rollouts.items import anchor_items, pointwise_items
from workflow_scripts.rollouts.record import ROLLOUT
from workflow_scripts.running.provenance import sidecar_path

HPDV2_PROMPTS = 107_515  # x 6 = 645,090 pairs, x 4 = 430,060 images
IMAGEREWARD_PROMPTS = 8_000  # x 6 = 48,000 images
SIDE = 512  # pixels of an image side, as in most published images


# --------------------------------------------------------------------------------------------------------- annotations


def words(rng: random.Random) -> str:
    """Return a prompt of usual length."""
    return " ".join(f"{rng.getrandbits(24):x}" for _ in range(rng.randint(5, 40)))


def hpdv2_train_rows(rng: random.Random, prompts: int) -> Iterator[dict[str, Any]]:
    """Yield rows of train.json."""
    for prompt in range(prompts):
        text, names = words(rng), [f"{4 * prompt + i:08d}.jpg" for i in range(4)]
        for a, b in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
            yield {"prompt": text, "image_path": [names[a], names[b]], "human_preference": [0, 1]}


def hpdv2_test_rows(rng: random.Random, prompts: int) -> Iterator[dict[str, Any]]:
    """Yield rows of test.json."""
    for prompt in range(prompts):
        ranks = list(range(9))
        raw = [{"annotation": ranks, "user_hash": f"{i}"} for i in range(10)]
        names = [f"{9 * prompt + i:08d}.jpg" for i in ranks]
        yield {"prompt": words(rng), "image_path": names, "rank": ranks, "raw_annotations": raw}


def imagereward_rows(rng: random.Random, split: str, prompts: int) -> Iterator[dict[str, Any]]:
    """Yield rows of metadata-{split}.parquet."""
    for prompt in range(prompts):
        text = words(rng)
        for image in range(6):
            yield {
                "image_path": f"images/{split}/{split}_{prompt // 250 + 1}/{split}-{prompt}-{image}.webp",
                "prompt_id": f"{prompt:06d}-{len(split):04d}",
                "prompt": text,
                "classification": "People",
                "image_amount_in_total": 6,
                "rank": 1 + image % 5,
                "overall_rating": 4,
                "image_text_alignment_rating": 4,
                "fidelity_rating": 4,
            }


def write_json_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write a JSON list row by row."""
    with path.open("w") as file:
        file.write("[" + json.dumps(next(rows)))
        file.writelines("," + json.dumps(row) for row in rows)
        file.write("]")


def write_hpdv2_annotations(folder: Path, prompts: int) -> Path:
    """Write train.json and test.json of HPDv2 with 6 pairs per prompt; return their record."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    write_json_rows(folder / "train.json", hpdv2_train_rows(rng, prompts))
    write_json_rows(folder / "test.json", hpdv2_test_rows(rng, 400))
    return write_record(folder)


def write_imagereward_annotations(folder: Path, prompts: int) -> Path:
    """Write the metadata of ImageRewardDB with 6 images per prompt; return their record."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for split, count in {"train": prompts, "test": 466}.items():
        rows = pa.Table.from_pylist(list(imagereward_rows(rng, split, count)), METADATA)
        pq.write_table(rows, folder / f"metadata-{split}.parquet")
    archives = prompts // 250 + 2
    return write_record(folder, [f"images/{s}/{s}_{i}.zip" for s in ("train", "test") for i in range(1, archives)])


def write_record(folder: Path, absent: list[str] | None = None) -> Path:
    """Write dataset.json for the files of a folder, with its sidecar; it also names `absent` archives."""
    files = {path.name: file_record(path) for path in sorted(folder.iterdir())}
    record = folder / "dataset.json"
    write_json(
        record,
        {"files": files | dict.fromkeys(absent or []), "source": "made up", "revision": None, "train_set": None},
    )
    write_sidecar(record)
    return record


def write_sidecar(*outputs: Path, **more: Any) -> None:
    """Write the sidecar that a stage would write for these files."""
    known = {"outputs": {path.name: file_record(path) for path in outputs}, "mlflow_run_id": None}
    write_json(sidecar_path(outputs[0]), known | more)


# ------------------------------------------------------------------------------------------------------------ archives


def photographs(count: int, image_format: str, quality: int) -> list[bytes]:
    """Return encoded images with the detail of photographs: noise at several scales."""
    rng = np.random.default_rng(0)

    def noise(scale: int) -> Any:
        coarse = rng.integers(0, 256, (SIDE // scale + 2, SIDE // scale + 2, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)

    found = []
    for _ in range(count):
        pixels = sum(weight * noise(scale) for scale, weight in ((128, 0.5), (32, 0.3), (8, 0.15), (2, 0.05)))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, image_format, quality=quality)
        found.append(buffer.getvalue())
    return found


def write_archive(path: Path, images: int) -> dict[str, list[str]]:
    """Write train.tar.gz of HPDv2 (JPEG) or a zip of ImageRewardDB (WebP); return the names of its images."""
    zipped = path.suffix == ".zip"
    pictures = photographs(16, "WEBP", 90) if zipped else photographs(16, "JPEG", 95)
    names = [f"{number:08d}.{'webp' if zipped else 'jpg'}" for number in range(images)]
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for number, name in enumerate(names):
                archive.writestr(name, pictures[number % 16])
    else:
        with tarfile.open(path, "w:gz", compresslevel=1) as tar:
            for number, name in enumerate(names):
                member = tarfile.TarInfo(f"train/{name}")
                member.size = len(pictures[number % 16])
                tar.addfile(member, io.BytesIO(pictures[number % 16]))
    return {path.name: names}


def write_image_subset(path: Path, archive: str, names: list[str]) -> None:
    """Write a subset.parquet with eight of these images per prompt, and its sidecar."""
    rows = []
    for position, start in enumerate(range(0, len(names), 8)):
        images = names[start : start + 8]
        rows.append(subset_row(f"p{position:06d}", images, position) | {"archives": [archive] * len(images)})
    write_preferences(path, rows, SUBSET)
    write_sidecar(path)


# ------------------------------------------------------------------------------------------------------------ rollouts


def subset_row(prompt_id: str, images: list[str], position: int) -> dict[str, Any]:
    """Return a row of SUBSET with empty judgements."""
    empty = dict.fromkeys(("ranks", "ratings", "alignment_ratings", "fidelity_ratings", "pairs", "annotations"))
    row = {"prompt_id": prompt_id, "prompt": "made up", "image_ids": images, "archives": ["a.zip"] * len(images)}
    return row | empty | {"position": position}


def write_test_set(path: Path, dataset: str, prompts: int) -> list[dict[str, Any]]:
    """Write the subset.parquet of a test set, with its sidecar: ranks, for HPDv2 those of ten annotators."""
    rng = np.random.default_rng(0)
    counts = list(IMAGE_COUNTS)
    shares = np.array(list(IMAGE_COUNTS.values())) / sum(IMAGE_COUNTS.values())
    rows = []
    for position in range(prompts):
        number = 9 + (position % 4 == 3) if dataset == "hpsv2" else int(rng.choice(counts, p=shares))
        row = subset_row(f"p{position:06d}", [f"{position:06d}-{i}" for i in range(number)], position)
        if dataset == "hpsv2":
            row["annotations"] = [(rng.permutation(number) + 1).tolist() for _ in range(10)]
            row["ranks"] = row["annotations"][0]
        else:
            row["ranks"] = rng.integers(1, 6, number).tolist()
        rows.append(row)
    write_preferences(path, rows, SUBSET)
    write_sidecar(path)
    return rows


def write_rollouts(path: Path, dataset: str, rows: list[dict[str, Any]], rollouts: int, seed: int) -> int:
    """Write a rollout file with random answers, and its sidecar; return its number of rows.

    Args:
        path: File to write.
        dataset: "hpsv2" for pairs with an anchor, else single images.
        rows: Rows of the test set.
        rollouts: Rollouts of each item.
        seed: Seed of the answers.
    """
    rng = np.random.default_rng(seed)
    readable = {image for row in rows for image in row["image_ids"]}
    pairwise = dataset == "hpsv2"
    items = anchor_items(rows, readable, 0, False) if pairwise else pointwise_items(rows, readable)
    items = sorted(items, key=lambda item: item.item_id)
    names = {name: [item.columns()[name] for item in items] for name in items[0].columns()}
    number = len(items) * rollouts
    logits = rng.normal(size=(number, 2 if pairwise else 7))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    answered = rng.random(number) > 0.02
    sampled = logits.argmax(axis=1) + (not pairwise)
    tokens = 40
    repeated = {
        name: pa.array(values).take(np.repeat(np.arange(len(items)), rollouts)) for name, values in names.items()
    }
    columns = {
        **repeated,
        "k": np.tile(np.arange(rollouts), len(items)),
        "seed": np.full(number, seed),
        "completion_ids": pa.ListArray.from_arrays(
            np.arange(0, number * tokens + 1, tokens), rng.integers(0, 4000, number * tokens)
        ),
        "text": pa.array([f"<think>{'words ' * 20}{i}</think>" for i in range(number)]),
        "answer_position": np.full(number, tokens - 2),
        "forced": ~answered,
        "sampled_answer": pa.array(sampled, mask=~answered),
        "answer_logprobs": pa.ListArray.from_arrays(
            np.arange(0, logprobs.size + 1, logprobs.shape[1]), logprobs.ravel()
        ),
    }
    table = pa.table([pa.array(columns[name]).cast(ROLLOUT.field(name).type) for name in ROLLOUT.names], ROLLOUT)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")
    write_sidecar(path)
    return number
