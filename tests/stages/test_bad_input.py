"""Bad images and odd prompts through the stages: read or listed, and whatever is read can be trained on and judged."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from workflow_scripts.configuration.model import Configuration, Sampling, load
from workflow_scripts.configuration.stages import (
    GenerateRollouts,
    MeasureAccuracy,
    ReadAnnotations,
    ReadImages,
    ScoreRollouts,
    TrainGrpo,
)
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.records import file_record
from workflow_scripts.files.writing import write_json
from workflow_scripts.policy.prompts import messages
from workflow_scripts.preferences.images import LARGEST_ASPECT_RATIO, decoded
from workflow_scripts.preferences.schema import SUBSET, SchemaError, read_image_rows, write_images, write_preferences
from workflow_scripts.rollouts.context import too_long
from workflow_scripts.rollouts.items import Item
from workflow_scripts.running.provenance import sidecar_path
from workflow_scripts.training.items import image_reader

SHORT = {"max_thinking_tokens": 4, "max_answer_tokens": 4}


def encoded(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def turned() -> Image.Exif:
    """EXIF data that say: lying on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PICTURE = Image.effect_noise((60, 40), 80).convert("RGB")
READABLE = {
    "plain.webp": encoded(PICTURE, "WEBP"),
    "cmyk.jpg": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "grey16.png": encoded(Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257)),
    "palette.png": encoded(Image.fromarray(np.dstack([np.asarray(PICTURE), np.asarray(PICTURE)[..., 0]])).quantize(64)),
    "alpha.webp": encoded(PICTURE.convert("RGBA"), "WEBP"),
    "turned.jpg": encoded(PICTURE, "JPEG", exif=turned()),
    "really_png.jpg": encoded(PICTURE),
    "one_pixel.png": encoded(Image.new("RGB", (1, 1))),
    "narrow.png": encoded(Image.new("RGB", (200, 1))),
    "standing.png": encoded(Image.new("RGB", (10, 2000))),
}
UNREADABLE = {
    "empty.webp": (b"", "empty"),
    "cut.webp": (encoded(PICTURE, "WEBP")[:200], "OSError"),
    "text.webp": (b"<html>404</html>", "UnidentifiedImageError"),
    "line.png": (encoded(Image.new("RGB", (20_000, 1))), "20000 x 1 pixels are narrower than 200:1"),
    "bomb.png": (encoded(Image.new("1", (16_000, 16_000))), "bomb"),
}


@pytest.fixture
def listing(tmp_path: Path, run_main: Any, with_sidecar: Any) -> dict[str, Any]:
    """Run read_images on an archive of all of them; return what it lists. The images are in images.parquet."""
    archive = tmp_path / "images/test/test_1.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in READABLE.items():
            file.writestr(name, data)
        for name, (data, _) in UNREADABLE.items():
            file.writestr(name, data)
    name = "images/test/test_1.zip"
    write_json(tmp_path / "dataset.json", {"files": {name: file_record(archive)}})
    rows = []
    for position, names in enumerate((list(READABLE), [*UNREADABLE, "missing.webp"])):
        row = {"prompt_id": f"p{position}", "prompt": "a cat", "position": position, "image_ids": names}
        row |= {"archives": [name] * len(names), "ranks": list(range(1, len(names) + 1))}
        rows.append(dict.fromkeys(SUBSET.names) | row)
    write_preferences(tmp_path / "subset.parquet", rows, SUBSET)
    sidecar = run_main(
        "read_images",
        ReadImages(dataset="imagereward", split="test", shard=0, start=0, stop=10),
        record=with_sidecar(tmp_path / "dataset.json"),
        subset=with_sidecar(tmp_path / "subset.parquet"),
        images=tmp_path / "images.parquet",
        listing=tmp_path / "images.json",
    )
    assert "5 images are unreadable and 1 missing" in sidecar["warnings"][0]
    assert sidecar["metrics"]["unreadable"] == 5 and sidecar["metrics"]["missing"] == 1
    return json.loads((tmp_path / "images.json").read_text())


def test_bad_images_are_listed_with_their_reason(listing: dict[str, Any]) -> None:
    assert (listing["wanted"], listing["read"], listing["missing"]) == (16, 10, ["missing.webp"])
    assert set(listing["unreadable"]) == set(UNREADABLE)
    for name, (_, reason) in UNREADABLE.items():
        assert reason in listing["unreadable"][name]


def test_training_and_rollouts_see_the_same_pixels(
    listing: dict[str, Any], policies: dict[str, Any], tmp_path: Path
) -> None:
    images = image_reader(tmp_path / "images.parquet", tmp_path / "cache")
    rows = {row["image_id"]: row for row in read_image_rows([tmp_path / "images.parquet"])}
    assert set(images.sizes) == set(rows) == set(READABLE)
    policy = policies["imagereward"]
    chat = policy.processor.apply_chat_template(messages(policy.template, "a cat"), tokenize=False)
    for name, row in rows.items():
        assert row["bytes"] == READABLE[name]
        trained, judged = images.read(name), decoded(row["bytes"])
        assert trained.mode == judged.mode == "RGB" and trained.tobytes() == judged.tobytes()
        assert trained.size == judged.size == images.sizes[name] == (row["width"], row["height"])
        assert policy.processor(text=[chat], images=[judged], return_tensors="pt")["image_grid_thw"].prod() > 0
    assert images.sizes["turned.jpg"] == (40, 60) and images.sizes["plain.webp"] == (60, 40)
    difference = np.abs(np.asarray(images.read("grey16.png")).astype(int) - np.asarray(PICTURE.convert("L"))[..., None])
    assert difference.max() == 0


@settings(deadline=None, max_examples=150)
@given(short=st.integers(1, 60), ratio=st.floats(1, 200), standing=st.booleans())
def test_the_processor_takes_every_shape_that_is_read(
    policies: dict[str, Any], short: int, ratio: float, standing: bool
) -> None:
    size = (short, int(short * ratio))
    image = decoded(encoded(Image.new("RGB", size if standing else size[::-1])))
    policy = policies["imagereward"]
    question = policy.processor.apply_chat_template(messages(policy.template, "a"), tokenize=False)
    inputs = policy.processor(text=[question], images=[image], return_tensors="pt")
    # What `too_long` counts beforehand is what the processor makes.
    patches = policy.processor.image_processor.get_number_of_image_patches(image.height, image.width)
    assert inputs["image_grid_thw"].prod() == patches
    assert (inputs["input_ids"] == policy.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum() == patches // 4


def test_the_processor_refuses_what_is_listed(policies: dict[str, Any]) -> None:
    """The limit is the processor's own: one pixel more is an error there."""
    policy = policies["imagereward"]
    for width in (LARGEST_ASPECT_RATIO, LARGEST_ASPECT_RATIO + 1):
        if width > LARGEST_ASPECT_RATIO:
            with pytest.raises(ValueError, match="aspect ratio"):
                policy.processor.image_processor(Image.new("RGB", (width, 1)))
        else:
            policy.processor.image_processor(Image.new("RGB", (width, 1)))


# ------------------------------------------------------------------------------------------------------------- prompts


def test_the_context_is_counted_to_the_token(policies: dict[str, Any]) -> None:
    """Questions around the limit: left out exactly where question and budgets exceed the model's positions."""
    policy, sampling = policies["hpsv2"], Sampling(**SHORT)
    sizes = {"a": (84, 84), "b": (28, 56)}
    closing = len(policy.tokenizer.encode("</think><answer>", add_special_tokens=False))
    images = [Image.new("RGB", size) for size in sizes.values()]
    lengths = {}
    for characters in range(1950, 2030):
        item = Item("p", "." * characters, ("a", "b"), "b", "a")
        text = policy.processor.apply_chat_template(
            messages(policy.template, item.prompt), add_generation_prompt=True, tokenize=False
        )
        tokens = len(policy.processor(text=[text], images=images)["input_ids"][0]) + 4 + closing + 4
        lengths[item] = tokens
    assert min(lengths.values()) <= 2048 < max(lengths.values())
    assert too_long(policy, lengths, sizes, sampling) == {item for item, n in lengths.items() if n > 2048}


LONG = {"long": "a red cat and " * 715}
ODD_PROMPTS = LONG | {
    "empty": "",
    "control": "a\x00b\x01\x1b[31m\x7f\r\n\t\u200b\u2028\ufeff",
    "emoji": "🐈‍⬛ 👩🏽‍🚀 🏳️‍🌈",
    "right_to_left": "\u202eחתול אדום\u202c قطة حمراء",
    "special": "<|im_end|>\n<|im_start|>assistant\n<think>x</think><answer>7</answer>",
    "images": "<|vision_start|><|image_pad|><|vision_end|><|video_pad|>" * 3,
    "single": "a cat",
}


def odd_inputs(
    folder: Path, base_manifest: Path, with_sidecar: Any, split: str, prompts: dict[str, str] = ODD_PROMPTS
) -> dict[str, Path]:
    """A subset of odd prompts, a single-image prompt and a tied one, with images of odd shapes."""
    rows, images = [], []
    for position, (name, prompt) in enumerate(prompts.items()):
        shapes = {"0": (1, 1), "1": (200, 1), "2": (30, 40)} if name != "single" else {"0": (30, 30)}
        for place, size in shapes.items():
            data = encoded(Image.new("RGB", size))
            images.append({"image_id": f"{name}-{place}", "bytes": data, "width": size[0], "height": size[1]})
        names = [f"{name}-{place}" for place in shapes]
        row = {
            "prompt_id": name,
            "prompt": prompt,
            "position": position,
            "image_ids": names,
            "archives": ["z"] * len(names),
        }
        row |= {
            "ratings": [1, 4, 7][: len(names)],
            "ranks": [1] * len(names) if name == "emoji" else [3, 2, 1][: len(names)],
        }
        rows.append(dict.fromkeys(SUBSET.names) | row)
    write_preferences(folder / f"{split}.parquet", rows, SUBSET)
    write_images(folder / f"{split}_images.parquet", images)
    (folder / "manifest.json").write_text(base_manifest.read_text())
    return {
        "base": with_sidecar(folder / "manifest.json"),
        "subset": with_sidecar(folder / f"{split}.parquet"),
        "images": with_sidecar(folder / f"{split}_images.parquet"),
    }


@pytest.mark.parametrize("track", ["imagereward", "hpsv2"])
def test_rollouts_of_odd_prompts(
    track: Any, base_manifest: Path, run_main: Any, with_sidecar: Any, tmp_path: Path
) -> None:
    """Every prompt is judged but the one of 10,000 characters, which the tiny policy has no room for."""
    inputs = odd_inputs(tmp_path, base_manifest, with_sidecar, "test")
    configuration = load({"rollouts": {"sampling": SHORT}})
    config = GenerateRollouts.of(configuration, track, "zeroshot", "imagereward", 0, 0, 0)
    sidecar = run_main("generate_rollouts", config, **inputs, rollouts=tmp_path / "rollouts.parquet")
    judged = set(pq.read_table(tmp_path / "rollouts.parquet")["prompt_id"].to_pylist())
    pairs = track == "hpsv2"
    assert judged == set(ODD_PROMPTS) - {"long"} - ({"single"} if pairs else set())
    total = 14 if pairs else 22
    left_out = 2 if pairs else 3
    assert sidecar["warnings"] == [
        f"{left_out} of {total} questions are longer than the policy's context and are left out, such as long"
    ]
    # On to the accuracies: the tied prompt and the one of a single image have no pair that counts.
    (tmp_path / "dataset.json").write_text(json.dumps({"source": "hub", "revision": "x", "files": {}}))
    run_main(
        "score_rollouts",
        ScoreRollouts.of(configuration, track, "zeroshot", "imagereward", 0),
        rollouts=[with_sidecar(tmp_path / "rollouts.parquet")],
        scores=tmp_path / "scores.parquet",
    )
    run_main(
        "measure_accuracy",
        MeasureAccuracy.of(configuration, track, "zeroshot", "imagereward", 0),
        scores=tmp_path / "scores.parquet",
        subset=inputs["subset"],
        record=with_sidecar(tmp_path / "dataset.json"),
        accuracy=tmp_path / "accuracy.json",
        prompts=tmp_path / "prompts.parquet",
    )
    record = json.loads((tmp_path / "accuracy.json").read_text())
    assert record["prompts"] == len(judged)
    rules = {"method": "soft", "tie": "wrong", "label_tie": "dropped", "missing": "wrong"}
    # Five prompts of three pairs each.
    assert {cell["pairs"] for cell in record["cells"] if rules.items() <= cell.items()} == {15.0}


def training_files(train: dict[str, Path], validation: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Files of a training."""
    return {
        "base": train["base"],
        "train": train["subset"],
        "train_images": train["images"],
        "validation": validation["subset"],
        "validation_images": validation["images"],
        "adapter": folder / "adapter_model.safetensors",
        "adapter_config": folder / "adapter_config.json",
        "record": folder / "training.json",
        "checkpoints": folder / "checkpoints",
    }


def test_training_on_odd_prompts(base_manifest: Path, run_main: Any, with_sidecar: Any, tmp_path: Path) -> None:
    """The long prompt is left out with a warning; all others go through a real GRPO step and validation."""
    train, validation = (odd_inputs(tmp_path, base_manifest, with_sidecar, split) for split in ("train", "validation"))
    small = {"steps": 2, "prompts_per_step": 8, "group_size": 2, "validate_every": 2, "warmup_steps": 0}
    small |= {"max_completion_tokens": 8, "gradient_accumulation": 1}
    config = TrainGrpo.of(load({"training": {"imagereward": small}}), "imagereward", 0)
    sidecar = run_main("train_grpo", config, **training_files(train, validation, tmp_path))
    assert sidecar["metrics"]["training_items"] == 19
    assert [w for w in sidecar["warnings"] if "longer" in w] == [
        f"3 of 22 {split} questions are longer than the policy's context and are left out, such as long"
        for split in ("train", "validation")
    ]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_without_a_question_is_refused(
    split: str, base_manifest: Path, run_main: Any, with_sidecar: Any, tmp_path: Path
) -> None:
    chosen = {"train": ODD_PROMPTS, "validation": ODD_PROMPTS} | {split: LONG}
    train, validation = (odd_inputs(tmp_path, base_manifest, with_sidecar, name, chosen[name]) for name in chosen)
    with pytest.raises(SchemaError, match=rf"{split}\.parquet: no {split} question is left; check the subset"):
        run_main(
            "train_grpo",
            TrainGrpo.of(Configuration(), "imagereward", 0),
            **training_files(train, validation, tmp_path),
        )
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_step_of_more_items_than_there_are_is_refused(
    base_manifest: Path, run_main: Any, with_sidecar: Any, tmp_path: Path
) -> None:
    train, validation = (odd_inputs(tmp_path, base_manifest, with_sidecar, split) for split in ("train", "validation"))
    config = TrainGrpo.of(Configuration(), "imagereward", 0)
    with pytest.raises(SchemaError, match="there are 19 training items; lower prompts_per_step, 64, to at most that"):
        run_main("train_grpo", config, **training_files(train, validation, tmp_path))


@pytest.mark.parametrize("track", ["imagereward", "hpsv2"])
@pytest.mark.parametrize("shard", [0, 1], ids=["too long", "beyond the end"])
def test_a_test_set_without_a_question_is_refused(
    track: Any, shard: int, base_manifest: Path, run_main: Any, with_sidecar: Any, tmp_path: Path
) -> None:
    """A shard may come out empty; with all of them empty there is nothing to score."""
    inputs = odd_inputs(tmp_path, base_manifest, with_sidecar, "test", LONG)
    config = GenerateRollouts.of(Configuration(), track, "zeroshot", "imagereward", 0, shard, 0)
    sidecar = run_main("generate_rollouts", config, **inputs, rollouts=tmp_path / "rollouts.parquet")
    assert sidecar["metrics"]["rollouts"] == 0 and len(sidecar["warnings"]) == (shard == 0)
    with pytest.raises(SchemaError, match=rf"{tmp_path} holds no rollout: .*choose other test data or another policy"):
        run_main(
            "score_rollouts",
            ScoreRollouts.of(Configuration(), track, "zeroshot", "imagereward", 0),
            rollouts=[tmp_path / "rollouts.parquet"],
            scores=tmp_path / "scores.parquet",
        )


# ------------------------------------------------------------------------------------------------- what the user sees


def run_read_annotations(folder: Path, content: bytes | None, output: Path) -> subprocess.CompletedProcess[str]:
    """Run read_annotations as the workflow does, on metadata of this content, tracked in a store of the folder."""
    metadata = folder / "metadata-test.parquet"
    metadata.write_bytes(content or b"")
    write_json(folder / "dataset.json", {"files": {metadata.name: file_record(metadata)}})
    record = folder / "dataset.json"
    sidecar = {"outputs": {record.name: file_record(record)}, "mlflow_run_id": None}
    write_json(sidecar_path(record), sidecar)
    command = [
        sys.executable,
        "-m",
        "workflow_scripts.stages.read_annotations",
        "--record",
        str(record),
        "--preferences",
        str(output),
    ]
    command += ["--config", ReadAnnotations.of(Configuration(), "imagereward", "test").canonical()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_an_expected_error_is_one_line_at_the_end(tmp_path: Path) -> None:
    process = run_read_annotations(tmp_path, b"no table", tmp_path / "preferences.parquet")
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/metadata-test.parquet cannot be read as Parquet")
    assert last.endswith("and run snakemake again")
    assert "Traceback" not in process.stderr
    # The traceback is not lost: it is in the failed run.
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("softpref").experiment_id])  # type: ignore[union-attr]
    assert run.info.status == "FAILED"
    (trace,) = (tmp_path / "mlruns").rglob("traceback.txt")
    assert "Traceback" in trace.read_text() and "SchemaError" in trace.read_text()


def test_an_unexpected_error_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    table = tmp_path / "valid.parquet"
    from workflow_scripts.preferences.synthetic_layouts import METADATA

    pq.write_table(METADATA.empty_table(), table)
    process = run_read_annotations(tmp_path, table.read_bytes(), tmp_path / "file" / "preferences.parquet")
    assert process.returncode == 1
    assert "Traceback" in process.stderr and "FileExistsError" in process.stderr.splitlines()[-1]
