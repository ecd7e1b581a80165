"""Qwen2.5-VL on its real configuration and vocabulary, at reduced depth and width with random weights.

The weights are not here, the vocabulary is: what the tokens of configs/paper.yaml are does not depend on weights.
"""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from qwen_vocabulary import SPECIAL_TOKENS, processor
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from workflow_scripts.configuration.model import Configuration, load
from workflow_scripts.configuration.overlays import read_configuration
from workflow_scripts.configuration.stages import ModelConfig, TrainGrpo
from workflow_scripts.files.paths import ROOT
from workflow_scripts.planning.architecture import architecture_of
from workflow_scripts.planning.devices import FACTS
from workflow_scripts.planning.tokens import estimated_tokens, read_policy
from workflow_scripts.policy.loading import as_policy
from workflow_scripts.policy.manifest import model_files
from workflow_scripts.policy.prompts import CLOSE_THINKING, OPEN_ANSWER, PREFERENCES, RATINGS, messages
from workflow_scripts.preferences.images import in_memory
from workflow_scripts.preferences.schema import SUBSET, write_images, write_preferences
from workflow_scripts.rollouts.items import pointwise_items
from workflow_scripts.rollouts.transformers_engine import generate

PAPER = read_configuration([ROOT / "configs/paper.yaml"])
PROMPTS = ["", "a cat", "A valley filled with red flowers with smoke flowing around - digital art by Studio Ghibli."]
VOCABULARY = 151936  # rows of the 3B's embedding; the tokenizer knows fewer


@pytest.fixture(scope="module")
def qwen() -> Any:
    """Return Qwen2.5-VL's processor with the image size of configs/paper.yaml."""
    return processor(shortest_edge=PAPER.policy.min_pixels, longest_edge=PAPER.policy.max_pixels)


def chat(qwen: Any, template: str, prompt: str) -> str:
    """A question in Qwen's chat."""
    return qwen.apply_chat_template(messages(template, prompt), add_generation_prompt=True, tokenize=False)


def test_the_vocabulary_is_that_of_qwen(qwen: Any) -> None:
    golden = [16, 17, 18, 220, 19, 20, 21, 22, 220, 15, 13, 20, 68, 12, 18, 481, 19, 17]
    assert qwen.tokenizer.encode("123 4567 0.5e-3 -42") == golden
    assert {name: qwen.tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS} == SPECIAL_TOKENS
    words = {"A": 32, " A": 362, "First": 5338, "Image": 1906, "answer": 9217, "think": 26865, "</": 522, "<": 27}
    assert {word: qwen.tokenizer.encode(word) for word in words} == {word: [number] for word, number in words.items()}


def test_answers_are_single_tokens_whatever_stands_before_the_tag(qwen: Any) -> None:
    config = {
        protocol: ModelConfig.of(PAPER, track)
        for protocol, track in (("pointwise", "imagereward"), ("pairwise", "hpsv2"))
    }
    assert as_policy(None, qwen, config["pointwise"]).answer_token_ids == [15 + rating for rating in RATINGS]  # type: ignore[arg-type]
    assert as_policy(None, qwen, config["pairwise"]).answer_token_ids == [15 + answer for answer in PREFERENCES]  # type: ignore[arg-type]
    for digit in range(10):
        for before in (OPEN_ANSWER, CLOSE_THINKING + OPEN_ANSWER, "so.</think>\n<answer>"):
            ids = qwen.tokenizer.encode(f"{before}{digit}</answer>")
            opening = qwen.tokenizer.encode(before)
            assert ids[: len(opening) + 1] == [*opening, 15 + digit]


@pytest.mark.parametrize("protocol", ["pointwise", "pairwise"])
def test_the_paper_s_questions_in_qwen_s_chat(qwen: Any, protocol: str) -> None:
    template, images = getattr(PAPER.prompts, protocol), {"pointwise": 1, "pairwise": 2}[protocol]
    for prompt in PROMPTS:
        text = chat(qwen, template, prompt)
        shown = [Image.new("RGB", (512, 512))] * images
        ids = qwen(text=[text], images=shown)["input_ids"][0]
        name = qwen.tokenizer.convert_tokens_to_ids
        assert ids[:3] == [name("<|im_start|>"), *qwen.tokenizer.encode("system\n")]
        assert ids[-3:] == [name("<|im_start|>"), *qwen.tokenizer.encode("assistant\n")]
        assert [ids.count(name(t)) for t in ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")] == [
            images,
            images,
            256 * images,
        ]
        assert qwen.tokenizer.decode(ids).count("You are a helpful assistant.") == 1
        words = len(ids) - 256 * images
        assert words == pytest.approx(estimated_tokens(template, prompt), rel=0.05)
        bare = chat(qwen, "{image}" * images, "")
        around = len(qwen(text=[bare], images=shown)["input_ids"][0]) - 256 * images
        assert around == FACTS["chat"]["tokens"] + images * FACTS["chat"]["image_marks"]


@pytest.mark.parametrize(
    ("size", "tokens"), [((256, 256), 81), ((480, 480), 256), ((512, 512), 256), ((512, 768), 247), ((1024, 1024), 256)]
)
def test_tokens_of_an_image_under_the_paper_s_cap(qwen: Any, size: tuple[int, int], tokens: int) -> None:
    ids = qwen(text=["<|image_pad|>"], images=[Image.new("RGB", size)])["input_ids"][0]
    assert len(ids) == tokens
    assert read_policy(PAPER).image(*size).tokens == tokens


@pytest.fixture(scope="module")
def small_qwen(qwen: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the manifest of a random model of two narrow layers with the whole vocabulary."""
    name = qwen.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "eos_token_id": name("<|im_end|>"),
            "pad_token_id": name("<|endoftext|>"),
        },
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
        | {"fullatt_block_indexes": [1]},
        image_token_id=name("<|image_pad|>"),
        video_token_id=name("<|video_pad|>"),
        vision_start_token_id=name("<|vision_start|>"),
        vision_end_token_id=name("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    ends = [name("<|im_end|>"), name("<|endoftext|>")]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=name("<|endoftext|>"))
    folder = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(folder / "model")
    qwen.save_pretrained(folder / "model")
    manifest = folder / "manifest.json"
    files = model_files(folder / "model")
    manifest.write_text(json.dumps({"path": str(folder / "model"), "repository": None, "files": files}))
    return manifest


def small_paper() -> Configuration:
    """configs/paper.yaml without vLLM, and small: 4 visual tokens, short thoughts, one step."""
    raw: dict[str, Any] = yaml.safe_load((ROOT / "configs/paper.yaml").read_text(encoding="utf-8"))
    raw["policy"] |= {"device": "cpu", "dtype": "float32", "min_pixels": 784, "max_pixels": 3136}
    raw["numeric_threads"] = 1
    raw["training"]["imagereward"] |= {"steps": 1, "prompts_per_step": 1, "group_size": 2, "gradient_accumulation": 2}
    raw["training"]["imagereward"] |= {"max_completion_tokens": 8, "validate_every": 1}
    for training in raw["training"].values():
        training["generation"] = "transformers"
    raw["rollouts"]["engine"] = "transformers"
    raw["rollouts"]["sampling"] |= {"max_thinking_tokens": 6}
    raw["tracking"] = {"enabled": False}
    return load(raw)


def pictures(count: int) -> dict[str, Image.Image]:
    """Images of one colour each."""
    rng = random.Random(0)
    return {f"{i}": Image.new("RGB", (64, 64), tuple(rng.randbytes(3))) for i in range(count)}


def test_the_paper_s_configuration_rolls_out_and_trains_on_the_real_vocabulary(
    small_qwen: Path, run_main: Any, with_sidecar: Any, tmp_path: Path
) -> None:
    """The stage itself for one step: the loss, the rewards and the adapter are there, and the gradient is not zero."""
    from workflow_scripts.policy.loading import load_policy

    c, shown = small_paper(), pictures(4)
    row = {"prompt_id": "p", "prompt": "a cat", "position": 0, "image_ids": list(shown), "archives": ["z"] * 4}
    row |= {"ranks": [1, 2, 3, 4], "ratings": [7, 5, 3, 1]}
    model = ModelConfig.of(c, "imagereward")
    policy = load_policy(small_qwen, None, model)
    items = pointwise_items([row], set(shown))
    found = list(
        generate(
            policy,
            items,
            in_memory(shown),
            rollouts=2,
            first_k=0,
            sampling=c.rollouts.sampling,
            batch_items=4,
            seed="s",
        )
    )
    assert len(found) == 8
    for rollout in found:  # a random model answers nothing by itself, so every thought is closed by the engine
        assert rollout["forced"] and OPEN_ANSWER in rollout["text"]
        assert torch.tensor(rollout["answer_logprobs"]).exp().sum().item() == pytest.approx(1)
        assert len(rollout["answer_logprobs"]) == 7

    write_preferences(tmp_path / "subset.parquet", [dict.fromkeys(SUBSET.names) | row], SUBSET)
    rows = []
    for name, picture in shown.items():
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", lossless=True)
        rows.append({"image_id": name, "bytes": buffer.getvalue(), "width": 64, "height": 64})
    write_images(tmp_path / "images.parquet", rows)
    subset, images = with_sidecar(tmp_path / "subset.parquet"), with_sidecar(tmp_path / "images.parquet")
    base = tmp_path / "manifest.json"
    base.write_bytes(small_qwen.read_bytes())
    sidecar = run_main(
        "train_grpo",
        TrainGrpo.of(c, "imagereward", 0),
        base=with_sidecar(base),
        train=subset,
        train_images=images,
        validation=subset,
        validation_images=images,
        adapter=tmp_path / "adapter_model.safetensors",
        adapter_config=tmp_path / "adapter_config.json",
        record=tmp_path / "training.json",
        checkpoints=tmp_path / "checkpoints",
    )
    assert sidecar["metrics"]["training_items"] == 4
    (step,) = (entry for entry in json.loads((tmp_path / "training.json").read_text())["history"] if "reward" in entry)
    assert step["completions/mean_length"] <= 8
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 4 * architecture_of(
        json.loads((small_qwen.parent / "model/config.json").read_text())
    ).adapter_parameters(16, c.training.imagereward.lora.target_modules)
