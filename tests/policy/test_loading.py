"""Loading of a policy: answer tokens, generation settings, layers of the adapter, merging."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.files.paths import ROOT
from workflow_scripts.policy.loading import answer_token_ids, load_model, load_policy, load_processor
from workflow_scripts.policy.manifest import PolicyError, base_path, model_files
from workflow_scripts.policy.prompts import ANSWERS, messages
from workflow_scripts.policy.tiny_qwen import TAGS

POINTWISE = ModelConfig.of(Configuration(), "imagereward")
PAIRWISE = ModelConfig.of(Configuration(), "hpsv2")


@pytest.mark.parametrize("track", ["imagereward", "hpsv2"])
def test_each_answer_is_one_token(policies: dict[str, Any], track: str) -> None:
    policy = policies[track]
    assert [policy.tokenizer.decode([token]) for token in policy.answer_token_ids] == list(map(str, policy.answers))
    for answer, token in zip(policy.answers, policy.answer_token_ids, strict=True):
        ids = policy.tokenizer(f"<think>a</think><answer>{answer}</answer>")["input_ids"]
        assert ids[-2:-1] == [token]


def merging_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Tokenizer of bytes that has learned to merge what often stands together in `text`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text] * 100, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_digit_that_merges_with_the_tag_is_refused() -> None:
    tokenizer = merging_tokenizer("<answer>7 <answer>7 >7")
    with pytest.raises(PolicyError, match=r"<answer>7.* must be a single token after the tag; choose a base policy"):
        answer_token_ids(tokenizer, ANSWERS["pointwise"])


def test_an_answer_of_two_tokens_is_refused(policies: dict[str, Any]) -> None:
    assert len(answer_token_ids(policies["imagereward"].tokenizer, (8, 9))) == 2
    with pytest.raises(PolicyError, match="the tokenizer writes <answer>10 as"):
        answer_token_ids(policies["imagereward"].tokenizer, (9, 10))


def test_a_tokenizer_without_tags_of_its_own_will_do() -> None:
    tokenizer = merging_tokenizer("some words that do not matter")
    ids = answer_token_ids(tokenizer, ANSWERS["pairwise"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["0", "1"]


def write_manifest(manifest: Path, path: str) -> Path:
    """Write the manifest of a model folder."""
    manifest.write_text(json.dumps({"path": path, "repository": None, "files": model_files(ROOT / path)}))
    base_path.cache_clear()
    return manifest


def test_paths_of_a_manifest_are_relative_to_the_repository(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    for path in ("models/tiny-qwen2.5-vl", str(ROOT / "models/tiny-qwen2.5-vl")):
        write_manifest(manifest, path)
        assert base_path(manifest) == ROOT / "models/tiny-qwen2.5-vl"


def test_sampling_settings_of_the_model_are_ignored(base_manifest: Path, tmp_path: Path) -> None:
    shutil.copytree(base_path(base_manifest), tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    ends = [settings["eos_token_id"][0], 1]
    loud = {"do_sample": True, "temperature": 1e-6, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.05}
    changed = settings | loud | {"eos_token_id": ends, "max_new_tokens": 1}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(changed))
    manifest = write_manifest(tmp_path / "manifest.json", str(tmp_path / "model"))
    kept = load_model(manifest, POINTWISE).generation_config
    assert kept.eos_token_id == ends
    plain = type(kept)()
    for name in (*loud, "max_new_tokens"):
        assert getattr(kept, name) == getattr(plain, name)


def test_images_are_scaled_to_the_configured_area(base_manifest: Path) -> None:
    for size, area in ((200, 7056), (10, 784)):
        processor = load_processor(base_manifest, POINTWISE)
        text = processor.apply_chat_template(messages(POINTWISE.template, "a"), tokenize=False)
        inputs = processor(text=[text], images=[Image.new("RGB", (size, size))], return_tensors="pt")
        assert inputs["image_grid_thw"].prod() * 14 * 14 == area
    assert processor.tokenizer.padding_side == "left"


def test_weights_load_in_the_configured_type(base_manifest: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model = load_model(base_manifest, POINTWISE.model_copy(update={"dtype": dtype}))
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        assert not model.training


def test_adapter_layers_are_those_of_the_language_model(policies: dict[str, Any]) -> None:
    lora = Configuration().training.imagereward.lora
    names = [name for name, module in policies["imagereward"].model.named_modules() if hasattr(module, "weight")]
    matched = [name for name in names if re.fullmatch(lora.target_modules, name)]
    layers = policies["imagereward"].model.config.text_config.num_hidden_layers
    assert len(matched) == 7 * layers
    assert not any("visual" in name or "vision" in name for name in matched)
    # The vision tower has layers of the same names, so the expression and not their absence keeps them out.
    assert any("visual" in name and name.endswith(("gate_proj", "up_proj", "down_proj")) for name in names)


def test_a_merged_adapter_gives_the_logits_of_the_unmerged_one(
    policies: dict[str, Any], base_manifest: Path, adapter: Path, scenes: Any
) -> None:
    prompt, pictures = scenes[0]
    merged = load_policy(base_manifest, adapter, PAIRWISE)
    assert not isinstance(merged.model, PeftModel)
    unmerged = PeftModel.from_pretrained(load_model(base_manifest, PAIRWISE), adapter).eval()
    text = merged.processor.apply_chat_template(messages(PAIRWISE.template, prompt), tokenize=False)
    inputs = merged.processor(text=[text], images=list(pictures.values())[:2], return_tensors="pt")

    def logits(model: Any, dtype: torch.dtype) -> torch.Tensor:
        floats = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        with torch.no_grad():
            return model.to(dtype)(**floats).logits

    base, one, two = (logits(model, torch.float32) for model in (policies["hpsv2"].model, unmerged, merged.model))
    assert (one - base).abs().max() > 0.1
    answers = [values[..., merged.answer_token_ids].double().log_softmax(-1) for values in (one, two)]
    torch.testing.assert_close(*answers, atol=1e-5, rtol=0)
    # All logits, in float64: one float32 forward is itself 2e-5 away from exact on the largest of them.
    exact = [logits(model, torch.float64) for model in (unmerged, merged.model)]
    torch.testing.assert_close(*exact, atol=1e-5, rtol=0)


def test_a_short_type_keeps_the_adapter_apart(base_manifest: Path, adapter: Path) -> None:
    policy = load_policy(base_manifest, adapter, PAIRWISE.model_copy(update={"dtype": "bfloat16"}))
    assert isinstance(policy.model, PeftModel)


def test_tags_are_single_tokens_that_decoding_keeps(policies: dict[str, Any]) -> None:
    tokenizer = policies["imagereward"].tokenizer
    for tag in TAGS:
        (token,) = tokenizer(tag)["input_ids"]
        assert tokenizer.decode([token], skip_special_tokens=True) == tag


def test_attention_is_computed_as_configured_and_comes_out_the_same(base_manifest: Path, scenes: Any) -> None:
    prompt, pictures = scenes[0]
    processor = load_processor(base_manifest, POINTWISE)
    chat = processor.apply_chat_template(messages(POINTWISE.template, prompt), add_generation_prompt=True)
    inputs = processor(text=[chat], images=[next(iter(pictures.values()))], return_tensors="pt")
    logits = {}
    for attention in ("sdpa", "eager"):
        model = load_model(base_manifest, POINTWISE.model_copy(update={"attention": attention}))
        parts = (model.config, model.config.text_config, model.config.vision_config)
        assert {part._attn_implementation for part in parts} == {attention}
        with torch.no_grad():
            logits[attention] = model(**inputs).logits
    assert torch.allclose(logits["sdpa"], logits["eager"], atol=1e-4)
