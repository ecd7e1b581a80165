"""The synthetic world in the published raw layouts of ImageRewardDB and HPDv2, including their blemishes.

Every prompt has its own random streams, named by data set, seed, split and number, so that it stays the same whatever
else the world contains. Files have fixed dates: the same seed gives the same bytes.
"""

import contextlib
import gzip
import io
import json
import os
import random
import tarfile
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from workflow_scripts.configuration.model import ConfigurationError, Hpdv2World, ImageRewardWorld, Split
from workflow_scripts.files.writing import replacing
from workflow_scripts.preferences.synthetic_annotators import (
    HPDV2_NOISE,
    IMAGEREWARD_NOISE,
    TEST_ANNOTATORS,
    Agreement,
    agreement,
    hpdv2_label,
    hpdv2_pairs,
    imagereward_label,
    noisy,
    utilities,
)
from workflow_scripts.preferences.synthetic_scenes import Group, Scene, draw, prompt_text, sample_prompt, sample_scene

# Images of a prompt: number of prompts with as many in ImageReward's published test split.
IMAGE_COUNTS = {4: 194, 5: 2, 6: 45, 7: 159, 8: 43, 9: 23}
LISTING_NOISE = 2.55  # in ImageReward's order of listing: the first listed of two images wins 59 % of the pairs
SPLIT_NUMBER = {"train": 1, "validation": 2, "test": 3}

# Blemishes: one in 160 prompts of ImageReward repeats the text of the prompt before (0.6 %), and one in 160 training
# prompts of either data set has the text of a test prompt.
BLEMISH_PERIOD = 160
REPEATED_AT = 20
LEAKED_AT = 10

# Skill of HPDv2's image generators by place in a test row: the probability that a part of the prompt comes out right.
# The mean ranks by place follow the published ones: best are 2, 1 and 8, worst is 5, and the photo that every fourth
# row has in the tenth place is better than all of them.
GENERATOR_SKILL = (0.45, 0.8, 0.87, 0.45, 0.3, 0.12, 0.72, 0.38, 0.8, 0.95)
TRAIN_GENERATORS = (0, 1, 6, 8)

RAW_DATE = 1_700_000_000  # modification time of every raw file, so that records of them are reproducible too
PROMPT_DRAWS = 20_000

Prompt = tuple[tuple[Group, ...], str]  # groups asked for, and the background

METADATA = pa.schema(
    [
        ("image_path", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("classification", pa.string()),
        ("image_amount_in_total", pa.int64()),
        ("rank", pa.int64()),
        ("overall_rating", pa.int64()),
        ("image_text_alignment_rating", pa.int64()),
        ("fidelity_rating", pa.int64()),
    ]
)


def stream(dataset: str, seed: int, split: str, index: int, purpose: str) -> random.Random:
    """Make the random stream for one purpose of one prompt."""
    return random.Random(f"{dataset} {seed} {split} {index} {purpose}")


def prompts(dataset: Literal["imagereward", "hpsv2"], seed: int, split: Split, count: int, tests: int) -> list[Prompt]:
    """Draw the prompts of a split: different texts, except for the blemishes.

    Args:
        dataset: whose prompts to draw.
        seed: of the world.
        split: of the data set; the texts of ImageReward's training and validation split do not overlap.
        count: number of prompts.
        tests: number of test prompts, whose texts leak into the training split.

    Raises:
        ConfigurationError: the world has fewer prompt texts.
    """
    leaked = prompts(dataset, seed, "test", tests, 0) if split == "train" else []
    chosen: list[Prompt] = []
    taken: set[str] = set()
    for index in range(count):
        period, place = divmod(index, BLEMISH_PERIOD)
        if place == REPEATED_AT and dataset == "imagereward":
            chosen.append(chosen[-1])
            continue
        if place == LEAKED_AT and period < len(leaked):
            chosen.append(leaked[period])
            continue
        rng = stream(dataset, seed, split, index, "prompt")
        for _ in range(PROMPT_DRAWS):
            prompt = sample_prompt(rng, test=split == "test")
            text = prompt_text(*prompt)
            fits = split == "test" or dataset == "hpsv2" or _for_validation(text) == (split == "validation")
            if fits and text not in taken:
                break
        else:
            raise ConfigurationError(
                f"datasets.{dataset}.synthetic.{split}_prompts: the synthetic world has no {count} different prompts "
                f"for {dataset}'s {split} split, only {index}; ask for fewer"
            )
        taken.add(text)
        chosen.append(prompt)
    return chosen


def _for_validation(text: str) -> bool:
    """Whether a text of the training part (one in five) belongs to ImageReward's validation split."""
    return sha256(text.encode()).digest()[1] < 51


def imagereward_scenes(seed: int, split: Split, index: int, prompt: Prompt) -> list[Scene]:
    """Draw 4 to 9 scenes for an ImageReward prompt, in an order of listing that correlates with their utility."""
    rng = stream("imagereward", seed, split, index, "scenes")
    count = rng.choices(list(IMAGE_COUNTS), list(IMAGE_COUNTS.values()))[0]
    scenes = [sample_scene(rng, *prompt) for _ in range(count)]
    keys = noisy(rng, utilities(scenes), LISTING_NOISE)
    return [scenes[i] for i in sorted(range(count), key=lambda i: -keys[i])]


def hpdv2_scenes(seed: int, split: Split, index: int, prompt: Prompt) -> list[Scene]:
    """Draw the scenes for an HPDv2 prompt: 4 in random order for training, 9 or 10 in generator order for a test."""
    rng = stream("hpsv2", seed, split, index, "scenes")
    generators: Sequence[int] = range(10 if index % 4 == 3 else 9)
    if split == "train":
        generators = rng.sample(TRAIN_GENERATORS, len(TRAIN_GENERATORS))
    scenes = []
    for generator in generators:
        s = GENERATOR_SKILL[generator]
        mistakes = (s**3, 3 * s**2 * (1 - s), 3 * s * (1 - s) ** 2, (1 - s) ** 3)
        scenes.append(sample_scene(rng, *prompt, mistakes, (s, (1 - s) / 3, (1 - s) / 3, (1 - s) / 3)))
    return scenes


# -------------------------------------------------------------------------------------------------------- ImageRewardDB


def write_imagereward(folder: Path, world: ImageRewardWorld) -> tuple[list[str], dict[str, Any]]:
    """Write metadata-{split}.parquet, images/{split}/{split}_{i}.zip and truth-{split}.parquet.

    Returns:
        The files written, relative to `folder`, and a summary with counts and measures on the test pairs.
    """
    files: list[str] = []
    summary: dict[str, Any] = {"splits": {}}
    splits: dict[Split, int] = {
        "train": world.train_prompts,
        "validation": world.validation_prompts,
        "test": world.test_prompts,
    }
    for split, count in splits.items():
        rows: list[dict[str, Any]] = []
        truth: dict[str, float] = {}
        unreadable: list[str] = []
        chosen = prompts("imagereward", world.seed, split, count, world.test_prompts)
        for number, start in enumerate(range(0, count, world.prompts_per_archive), 1):
            name = f"images/{split}/{split}_{number}"
            archived: list[dict[str, Any]] = []
            with replacing(folder / f"{name}.zip") as temporary, zipfile.ZipFile(temporary, "w") as archive:
                for index in range(start, min(start + world.prompts_per_archive, count)):
                    scenes = imagereward_scenes(world.seed, split, index, chosen[index])
                    prompt_rows = _imagereward_rows(world.seed, split, index, scenes, name)
                    names = [Path(row["image_path"]).name for row in prompt_rows]
                    truth |= dict(zip(names, utilities(scenes), strict=True))
                    archived += prompt_rows
                    data = [encoded(scene, "WEBP", lossless=True, method=1) for scene in scenes]
                    if split == "train" and 1 <= index <= world.unreadable_images:
                        data[-1] = _spoiled(data[-1], index)
                        unreadable.append(names[-1])
                    for member, content in zip(names, data, strict=True):
                        _write_member(archive, member, content)
                _write_member(archive, f"{Path(name).name}.json", json.dumps(archived).encode())
            files.append(f"{name}.zip")
            rows += archived
        _write_parquet(folder / f"metadata-{split}.parquet", pa.Table.from_pylist(rows, METADATA))
        _write_truth(folder, split, truth)
        files += [f"metadata-{split}.parquet", f"truth-{split}.parquet"]
        summary["splits"][split] = {"prompts": count, "images": len(rows), "unreadable_images": unreadable}
    _fix_dates(folder, files)
    return files, summary | {"measured": imagereward_agreement(world.seed, chosen)}


def _imagereward_rows(
    seed: int, split: Split, index: int, scenes: Sequence[Scene], folder: str
) -> list[dict[str, Any]]:
    """Make the metadata rows of one prompt, one for each of its scenes."""
    label = imagereward_label(stream("imagereward", seed, split, index, "annotator"), scenes)
    names = stream("imagereward", seed, split, index, "names")
    return [
        {
            "image_path": f"{folder}/{uuid.UUID(int=names.getrandbits(128), version=4)}.webp",
            "prompt_id": f"{index:06d}-{SPLIT_NUMBER[split]:04d}",
            "prompt": scene.prompt,
            "classification": "Abstract Shapes",
            "image_amount_in_total": len(scenes),
            "rank": rank,
            "overall_rating": overall,
            "image_text_alignment_rating": alignment,
            "fidelity_rating": fidelity,
        }
        for scene, rank, overall, alignment, fidelity in zip(scenes, *label, strict=True)
    ]


def imagereward_agreement(seed: int, tests: Sequence[Prompt]) -> dict[str, float]:
    """Measure agreement with the labels of the test prompts on strict pairs, and the share of tied pairs."""
    second = ceiling = first_listed = Agreement(0.0, 0)
    pairs = 0
    for index, prompt in enumerate(tests):
        scenes = imagereward_scenes(seed, "test", index, prompt)
        latent = utilities(scenes)
        ranks = imagereward_label(stream("imagereward", seed, "test", index, "annotator"), scenes).ranks
        other = stream("imagereward", seed, "test", index, "second annotator")
        second += agreement(ranks, noisy(other, latent, IMAGEREWARD_NOISE))
        ceiling += agreement(ranks, latent)
        first_listed += agreement(ranks, range(0, -len(ranks), -1))
        pairs += len(ranks) * (len(ranks) - 1) // 2
    return {
        "second_annotator_agreement": second.right / second.pairs,
        "ceiling": ceiling.right / ceiling.pairs,
        "first_listed_accuracy": first_listed.right / first_listed.pairs,
        "strict_pairs": ceiling.pairs,
        "tied_share": 1 - ceiling.pairs / pairs,
        "annotator_noise": IMAGEREWARD_NOISE,
    }


# ---------------------------------------------------------------------------------------------------------------- HPDv2


def write_hpdv2(folder: Path, world: Hpdv2World) -> tuple[list[str], dict[str, Any]]:
    """Write {split}.json, {split}.tar.gz and truth-{split}.parquet for train and test.

    Returns:
        The files written, relative to `folder`, and a summary with counts and measures on the test pairs.
    """
    files: list[str] = []
    summary: dict[str, Any] = {"splits": {}}
    splits: dict[Split, int] = {"train": world.train_prompts, "test": world.test_prompts}
    for split, count in splits.items():
        truth: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        unreadable: list[str] = []
        chosen = prompts("hpsv2", world.seed, split, count, world.test_prompts)
        with replacing(folder / f"{split}.tar.gz") as temporary, _open_tar(temporary) as archive:
            for index, prompt in enumerate(chosen):
                scenes = hpdv2_scenes(world.seed, split, index, prompt)
                names = [f"{len(truth) + i:08d}.jpg" for i in range(len(scenes))]
                truth |= dict(zip(names, utilities(scenes), strict=True))
                rows += _hpdv2_rows(world.seed, split, index, scenes, names)
                data = [encoded(scene, "JPEG", quality=95) for scene in scenes]
                if split == "train" and 1 <= index <= world.unreadable_images:
                    data[-1] = _spoiled(data[-1], index)
                    unreadable.append(names[-1])
                for name, content in zip(names, data, strict=True):
                    member = tarfile.TarInfo(f"{split}/{name}")  # mtime, uid and gid are 0
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        with replacing(folder / f"{split}.json") as temporary:
            temporary.write_text(json.dumps(rows), encoding="utf-8")
        _write_truth(folder, split, truth)
        files += [f"{split}.json", f"{split}.tar.gz", f"truth-{split}.parquet"]
        summary["splits"][split] = {"prompts": count, "images": len(truth), "unreadable_images": unreadable}
    _fix_dates(folder, files)
    return files, summary | {"measured": hpdv2_agreement(world.seed, chosen)}


def _hpdv2_rows(
    seed: int, split: Split, index: int, scenes: Sequence[Scene], names: Sequence[str]
) -> list[dict[str, Any]]:
    rng = stream("hpsv2", seed, split, index, "annotator")
    text = scenes[0].prompt
    if split == "train":
        return [
            {"prompt": text, "image_path": [names[a], names[b]], "human_preference": [1 - preferred, preferred]}
            for a, b, preferred in hpdv2_pairs(rng, scenes)
        ]
    ranks, annotations = hpdv2_label(rng, scenes)
    judged = zip(annotations, range(TEST_ANNOTATORS), strict=True)
    raw = [{"annotation": a, "user_hash": sha256(f"annotator {k}".encode()).hexdigest()} for a, k in judged]
    return [{"prompt": text, "image_path": list(names), "rank": ranks, "raw_annotations": raw}]


def hpdv2_agreement(seed: int, tests: Sequence[Prompt]) -> dict[str, float]:
    """Measure agreement with the labels of the test prompts."""
    single = ceiling = first_listed = Agreement(0.0, 0)
    for index, prompt in enumerate(tests):
        scenes = hpdv2_scenes(seed, "test", index, prompt)
        ranks, annotations = hpdv2_label(stream("hpsv2", seed, "test", index, "annotator"), scenes)
        for annotation in annotations:
            single += agreement(ranks, [-rank for rank in annotation])
        ceiling += agreement(ranks, utilities(scenes))
        first_listed += agreement(ranks, range(0, -len(ranks), -1))
    return {
        "single_annotator_agreement": single.right / single.pairs,
        "ceiling": ceiling.right / ceiling.pairs,
        "first_listed_accuracy": first_listed.right / first_listed.pairs,
        "strict_pairs": ceiling.pairs,
        "annotator_noise": HPDV2_NOISE,
    }


# ------------------------------------------------------------------------------------------------------------ the bytes


def encoded(scene: Scene, image_format: Literal["WEBP", "JPEG"], **options: Any) -> bytes:
    """Draw a scene and encode it as an image file."""
    buffer = io.BytesIO()
    draw(scene).save(buffer, image_format, **options)
    return buffer.getvalue()


def _spoiled(data: bytes, index: int) -> bytes:
    """Spoil an image as in the published data: empty or cut off, in turns."""
    return data[: len(data) // 2] if index % 2 else b""


def _write_member(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    member.external_attr = 0o644 << 16
    archive.writestr(member, data)


@contextlib.contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar.gz whose gzip header carries neither name nor date."""
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        yield archive


def _write_parquet(path: Path, table: pa.Table) -> None:
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def _write_truth(folder: Path, split: str, truth: dict[str, float]) -> None:
    """Write the latent utility of every image, which is not part of the published layout and which no reader uses."""
    columns = {"image_id": list(truth), "utility": list(truth.values())}
    _write_parquet(folder / f"truth-{split}.parquet", pa.table(columns))


def _fix_dates(folder: Path, files: Sequence[str]) -> None:
    for name in files:
        os.utime(folder / name, (RAW_DATE, RAW_DATE))
