"""The cold start, shortened: the same bytes each time, a folder that loads, labels on the completion only."""

import io
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from workflow_scripts.configuration.model import load
from workflow_scripts.configuration.stages import ColdStartPolicy
from workflow_scripts.policy import cold_start
from workflow_scripts.policy.prompts import PREFERENCES, RATINGS, sampled_answer, well_formed
from workflow_scripts.policy.tiny_qwen import TAGS, build_model
from workflow_scripts.preferences.synthetic_scenes import draw, held_out
from workflow_scripts.stages import cold_start_policy

SHORT = {"caption_steps": 3, "trace_steps": 2, "batch": 2}
TEMPLATES = {"pointwise": "{image} prompt: {prompt}. rate.", "pairwise": "one: {image} two: {image} prompt: {prompt}."}


def words(folder: Path) -> list[str]:
    """Command line of the shortened stage."""
    config = ColdStartPolicy.of(load({"policy": {"cold_start": SHORT}}))
    return ["--model", str(folder / "model.safetensors"), "--config", config.canonical()]


@pytest.fixture(scope="module")
def cold_started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that the shortened stage has written."""
    folder = tmp_path_factory.mktemp("cold_start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["cold_start_policy", *words(folder)])
        cold_start_policy.main()
    return folder


def test_another_process_gives_the_same_bytes(cold_started: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "workflow_scripts.stages.cold_start_policy", *words(tmp_path)]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "2"}, check=True)
    names = sorted(path.name for path in cold_started.iterdir() if "provenance" not in path.name)
    assert {"model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"} <= set(names)
    for name in names:
        assert (cold_started / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_folder_is_a_complete_model(cold_started: Path) -> None:
    processor = AutoProcessor.from_pretrained(cold_started)
    model = AutoModelForImageTextToText.from_pretrained(cold_started, dtype=torch.float32)
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert len(processor.tokenizer) == model.config.text_config.vocab_size <= 512 + len(TAGS)
    for text in [*TAGS, *"0123456789"]:
        assert len(processor.tokenizer(text)["input_ids"]) == 1
    digits = processor.tokenizer.tokenize("rate 10 of 77")
    assert [token for token in digits if token[-1].isdigit()] == ["1", "0", "7", "7"]
    example = cold_start.rating_example(cold_start.scenes_of_prompt(random.Random(0)), "{image}", random.Random(0))
    loss = model(**cold_start.collate([example], processor, processor.tokenizer)).loss
    assert 0 < loss.item() < 20


def test_training_changes_every_weight(cold_started: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(cold_started, dtype=torch.float16)
    trained = dict(model.named_parameters())
    fresh = dict(build_model(AutoProcessor.from_pretrained(cold_started).tokenizer, seed=0).half().named_parameters())
    assert trained.keys() == fresh.keys()
    assert not [name for name in trained if torch.equal(trained[name], fresh[name])]
    assert not [name for name in trained if not trained[name].isfinite().all()]


def test_labels_stand_on_the_completion_only(policies: dict[str, Any]) -> None:
    processor, rng = policies["hpsv2"].processor, random.Random(1)
    tokenizer = processor.tokenizer
    examples = [
        cold_start.pair_example(cold_start.scenes_of_prompt(rng), TEMPLATES["pairwise"], rng),
        cold_start.rating_example(cold_start.scenes_of_prompt(rng), TEMPLATES["pointwise"], rng),
    ]
    batch = cold_start.collate(examples, processor, tokenizer)
    assert len(batch["image_grid_thw"]) == 3
    for row, example in enumerate(examples):
        labelled = batch["labels"][row] != -100
        # One run of tokens, up to the end of the row's own text.
        assert labelled.nonzero()[:, 0].diff().eq(1).all()
        assert labelled.nonzero()[-1] + 1 == batch["attention_mask"][row].sum()
        assert torch.equal(batch["labels"][row][labelled], batch["input_ids"][row][labelled])
        assert tokenizer.decode(batch["labels"][row][labelled]) == example.completion + "<|im_end|>"
        question = tokenizer.decode(batch["input_ids"][row][: labelled.nonzero()[0]])
        assert question.endswith("<|im_start|>assistant\n") and "<answer>" not in question
        assert question.count("<|vision_start|>") == len(example.images)
        padding = batch["attention_mask"][row] == 0
        assert (batch["input_ids"][row][padding] == tokenizer.pad_token_id).all()
    assert batch["mm_token_type_ids"].sum() == 3 * 9


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32))
def test_traces_are_what_the_rewards_expect_but_for_a_lost_tag(seed: int) -> None:
    rng = random.Random(seed)
    scenes = cold_start.scenes_of_prompt(rng)
    for maker, answers in ((cold_start.rating_example, RATINGS), (cold_start.pair_example, PREFERENCES)):
        completion = maker(scenes, TEMPLATES["pointwise"], rng).completion
        assert well_formed(completion, answers) or sum(tag in completion for tag in TAGS) == 3
        if "</answer>" in completion:
            assert sampled_answer(completion, answers) in answers
        assert scenes[0].caption in completion


def test_the_teacher_never_sees_a_test_prompt() -> None:
    rng = random.Random(0)
    assert not any(held_out(scene.prompt) for _ in range(200) for scene in cold_start.scenes_of_prompt(rng))


def test_ratings_stay_on_the_scale() -> None:
    assert [cold_start.rating(utility) for utility in (9.0, 0.0, -1.0, -3.0, -3.5, -99.0)] == [7, 7, 5, 1, 1, 1]


def test_pictures_are_seen_as_published() -> None:
    scene = cold_start.scenes_of_prompt(random.Random(0))[0]
    rng, pixels = random.Random(0), draw(scene).tobytes()
    shown = [cold_start.published(scene, rng).convert("RGB") for _ in range(40)]
    untouched = sum(picture.tobytes() == pixels for picture in shown)
    assert 8 < untouched < 32
    assert {picture.size for picture in shown} == {(84, 84)}


def test_the_tokenizer_has_no_tag_from_its_corpus() -> None:
    buffer = io.StringIO()
    buffer.writelines(cold_start.corpus(TEMPLATES, prompts=3))
    assert not any(tag in buffer.getvalue() for tag in TAGS)
    assert not {"{image}", "{prompt}"} & set(buffer.getvalue().split())
