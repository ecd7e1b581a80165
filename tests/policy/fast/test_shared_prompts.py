"""Passes that share prompts against the model's own."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.policy.fast.enable import share_prompts
from workflow_scripts.policy.fast.shared_prompts import SharedPrompts, first_equal, shared_prefix
from workflow_scripts.policy.loading import load_model, load_processor
from workflow_scripts.policy.prompts import messages

LORA = {"r": 4, "target_modules": r".*language_model.*\.(q_proj|v_proj|down_proj)", "task_type": "CAUSAL_LM"}
COMPLETIONS = ["a red circle", "blue, and big", "<think>", "a red circle", "", "none of it is there"]


def adapted(manifest: Any, track: str, share: bool, checkpointing: bool = False) -> Any:
    """The bundled policy with an adapter whose weights are not zero, in training mode."""
    torch.manual_seed(0)
    model = load_model(manifest, ModelConfig.of(Configuration(), track))  # type: ignore[arg-type]
    if share:
        share_prompts(model)
    model = get_peft_model(model, LoraConfig(**LORA))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    return model.train()


@pytest.fixture(scope="module", params=["imagereward", "hpsv2"])
def batch(request: Any, base_manifest: Any, scenes: Any) -> tuple[str, dict[str, torch.Tensor], torch.Tensor]:
    """Track, inputs and labels of a batch as GRPO's: three prompts with four completions each, shuffled and padded."""
    config = ModelConfig.of(Configuration(), request.param)
    processor: Any = load_processor(base_manifest, config)
    shown = 2 if request.param == "hpsv2" else 1
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    texts, images = [], []
    for i in order:
        prompt, pictures = scenes[i // 4]
        # The first two prompts ask the same of different pictures.
        chat = messages(config.template, scenes[0][0] if i // 4 == 1 else prompt)
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        images.append(list(pictures.values())[:shown])
    inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    completions = [COMPLETIONS[i % len(COMPLETIONS)] + "<|im_end|>" for i in order]
    added = processor.tokenizer(completions, padding=True, padding_side="right", return_tensors="pt")
    length = added["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], added["input_ids"]], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], added["attention_mask"]], 1)
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, length))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-length] = -100
    return request.param, inputs, labels


@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients_are_those_of_the_plain_pass(batch: Any, base_manifest: Any, checkpointing: bool) -> None:
    track, inputs, labels = batch
    found = []
    for share in (False, True):
        model = adapted(base_manifest, track, share, checkpointing)
        backbone = model.get_base_model().base_model
        assert isinstance(backbone, SharedPrompts) == share
        states = backbone(**inputs, use_cache=False).last_hidden_state
        logits = model.get_base_model().lm_head(states[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        found.append((loss.detach(), states.detach()[inputs["attention_mask"] == 1], gradients))
    (loss, states, gradients), (shared_loss, shared_states, shared_gradients) = found
    torch.testing.assert_close(shared_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(shared_states, states, rtol=0, atol=2e-4)
    assert gradients.keys() == shared_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_head_scores_completions_alone(batch: Any, base_manifest: Any, checkpointing: bool) -> None:
    """Asked as TRL asks: completions have the scores of the plain pass, prompts have none."""
    track, inputs, labels = batch
    length = int((labels != -100).any(0).sum())
    found = []
    for share in (False, True):
        model = adapted(base_manifest, track, share, checkpointing)
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
        out = model(**inputs, labels=labels, fused_lm_head=True)
        assert out.log_probs.shape == (12, length if share else labels.shape[1] - 1)
        (out.log_probs.sum() + out.entropy.sum()).backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        found.append((out.log_probs[:, -length:].detach(), out.entropy[:, -length:].detach(), gradients))
    (scores, entropies, gradients), (few_scores, few_entropies, few_gradients) = found
    assert (scores != 0).any(0).all()
    torch.testing.assert_close(few_scores, scores, rtol=0, atol=2e-4)
    torch.testing.assert_close(few_entropies, entropies, rtol=0, atol=2e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(few_gradients[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("labelled", [None, 0, slice(0, 0)])
def test_scores_that_are_asked_for_otherwise_are_the_plain_ones(
    batch: Any, base_manifest: Any, labelled: int | slice | None
) -> None:
    """Without labels, with labels from the first token on, and with none at all."""
    track, inputs, _ = batch
    labels = torch.full_like(inputs["input_ids"], -100)
    asked: dict[str, Any] = {}
    if labelled is not None:
        labels[:, labelled] = inputs["input_ids"][:, labelled]
        asked = {"labels": labels, "fused_lm_head": True}
    found = []
    for share in (False, True):
        model = adapted(base_manifest, track, share).eval()
        add_fused_lm_head(model.get_base_model())
        with torch.no_grad():
            out = model(**inputs, **asked)
        found.append(out.log_probs if asked else out.logits[inputs["attention_mask"] == 1])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-3)


def test_rows_of_different_prompts_share_nothing(batch: Any, base_manifest: Any) -> None:
    track, inputs, _ = batch
    shown = len(inputs["image_grid_thw"]) // 12
    order = np.unique(inputs["input_ids"][:, :-8].numpy(), axis=0, return_index=True)[1][:2]
    pixels = inputs["pixel_values"].unflatten(0, (12, -1))[order].flatten(0, 1)
    grids = inputs["image_grid_thw"].unflatten(0, (12, shown))[order].flatten(0, 1)
    words = {name: inputs[name][order] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    found = [
        adapted(base_manifest, track, share)(**words, pixel_values=pixels, image_grid_thw=grids, use_cache=False).logits
        for share in (False, True)
    ]
    own = words["attention_mask"] == 1
    torch.testing.assert_close(found[0][own], found[1][own], rtol=0, atol=1e-3)


def test_each_image_is_encoded_once_and_each_prompt_computed_once(batch: Any, base_manifest: Any) -> None:
    track, inputs, _ = batch
    model = adapted(base_manifest, track, share=True)
    backbone = model.get_base_model().base_model
    encoded, computed = [], []
    backbone.visual.register_forward_pre_hook(lambda _, args, kwargs: encoded.append(len(args[0])), with_kwargs=True)
    backbone.language_model.layers[0].register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[:2]))
    with torch.no_grad():
        backbone(**inputs, use_cache=False)
    assert encoded == [len(inputs["pixel_values"]) // 4]
    (prompts, shared), (rows, own) = computed
    assert (prompts, rows) == (3, 12)
    assert shared + own == inputs["input_ids"].shape[1]
    prompt_length = inputs["input_ids"].shape[1] - 8
    assert shared >= prompt_length - 8


def test_a_prefill_encodes_each_image_once(batch: Any, base_manifest: Any) -> None:
    track, inputs, _ = batch
    plain, shared = adapted(base_manifest, track, False).eval(), adapted(base_manifest, track, True).eval()
    encoded = []
    visual = shared.get_base_model().base_model.visual
    visual.register_forward_pre_hook(lambda _, args, kwargs: encoded.append(len(args[0])), with_kwargs=True)
    with torch.no_grad():
        expected, found = (model(**inputs, use_cache=True) for model in (plain, shared))
    assert encoded == [len(inputs["pixel_values"]) // 4]
    own = inputs["attention_mask"] == 1
    torch.testing.assert_close(found.logits[own], expected.logits[own], rtol=0, atol=1e-3)
    assert found.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]


def counted(model: Any) -> tuple[Any, list[int]]:
    """The part below the head, and the number of patches of each pass through the vision tower."""
    backbone = model.get_base_model().base_model
    encoded: list[int] = []
    backbone.visual.register_forward_pre_hook(lambda _, args, kwargs: encoded.append(len(args[0])), with_kwargs=True)
    return backbone, encoded


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_over_the_same_images_encode_them_once(batch: Any, base_manifest: Any, checkpointing: bool) -> None:
    track, inputs, _ = batch
    model = adapted(base_manifest, track, share=True, checkpointing=checkpointing)
    backbone, encoded = counted(model)
    with torch.no_grad():
        first = backbone(**inputs, use_cache=False).last_hidden_state
    for _ in range(2):  # the second has a graph of its own
        again = backbone(**inputs, use_cache=False).last_hidden_state
        # Checkpointing has no shared prompts, and so another order of sums.
        own = inputs["attention_mask"] == 1
        torch.testing.assert_close(again[own], first[own], rtol=0, atol=2e-4 if checkpointing else 0)
        again.sum().backward()
    assert len(encoded) == 1
    shown = len(inputs["image_grid_thw"]) // 12
    some = {name: inputs[name][:1] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    some["image_grid_thw"] = inputs["image_grid_thw"][:shown]
    patches = int(some["image_grid_thw"].prod(-1).sum())
    backbone(**some, pixel_values=inputs["pixel_values"][:patches], use_cache=False)
    assert len(encoded) == 1  # a part of them
    backbone(**some, pixel_values=inputs["pixel_values"][:patches] + 0.1, use_cache=False)
    assert len(encoded) == 2
    assert sum(len(image.patches) for image in backbone._kept[1]) == patches  # and no others
    assert encoded[1] == patches


def passes(inputs: dict[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    """The inputs of a batch in passes of so many rows, as gradient accumulation divides a step."""
    images = inputs["image_grid_thw"].unflatten(0, (12, -1))
    patches = inputs["pixel_values"].unflatten(0, (12, -1))
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    return [
        {
            **{name: inputs[name][start : start + rows] for name in names},
            "image_grid_thw": images[start : start + rows].flatten(0, 1),
            "pixel_values": patches[start : start + rows].flatten(0, 1),
        }
        for start in range(0, 12, rows)
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_passes_of_a_step_encode_each_of_its_images_once(
    batch: Any, base_manifest: Any, checkpointing: bool
) -> None:
    """Without a prefill of the whole step, as where vLLM generates: first without gradients, then with them."""
    track, inputs, _ = batch
    images = 6 if track == "hpsv2" else 3  # three prompts
    model = adapted(base_manifest, track, True, checkpointing)
    plain = adapted(base_manifest, track, False, checkpointing)
    backbone, encoded = counted(model)
    backbone.step_images = images
    with_gradient: list[bool] = []
    backbone.visual.register_forward_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    own = [part["attention_mask"] == 1 for part in passes(inputs, 3)]
    for gradients in (False, True, True):
        for part, real in zip(passes(inputs, 3), own, strict=True):
            with torch.set_grad_enabled(gradients):
                states = backbone(**part, use_cache=False).last_hidden_state
                expected = plain.get_base_model().base_model(**part, use_cache=False).last_hidden_state
            torch.testing.assert_close(states[real], expected[real], rtol=0, atol=5e-4)
    assert sum(encoded) == images * len(inputs["pixel_values"]) // len(inputs["image_grid_thw"])
    # The next step's images take the place of these, and so do those of any pass outside training.
    following = [part | {"pixel_values": part["pixel_values"] + 0.1} for part in passes(inputs, 3)]
    for part in following:
        backbone(**part, use_cache=False)
        assert len(backbone._kept[1]) == images
    assert not any(with_gradient)
    with torch.no_grad():
        model.eval()(**passes(inputs, 1)[0], use_cache=False)
    assert len(backbone._kept[1]) == images // 3


def written(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.5)


def replaced(weight: torch.nn.Parameter) -> None:
    weight.data = weight.data * 1.5


@pytest.mark.parametrize("change", [written, replaced])
def test_a_changed_vision_tower_encodes_anew(batch: Any, base_manifest: Any, change: Any) -> None:
    track, inputs, _ = batch
    plain, shared = adapted(base_manifest, track, False), adapted(base_manifest, track, True)
    _, encoded = counted(shared)
    found = []
    with torch.no_grad():
        for _ in range(2):
            expected, states = (
                model.get_base_model().base_model(**inputs, use_cache=False).last_hidden_state
                for model in (plain, shared)
            )
            own = inputs["attention_mask"] == 1
            torch.testing.assert_close(states[own], expected[own], rtol=0, atol=5e-4)
            found.append(states[own])
            for model in (plain, shared):
                change(model.get_base_model().base_model.visual.patch_embed.proj.weight)
    assert (found[0] - found[1]).abs().max() > 0.01
    assert len(encoded) == 2


@pytest.mark.parametrize("frozen", [False, True])
def test_an_adapted_vision_tower_is_passed_each_time(batch: Any, base_manifest: Any, frozen: bool) -> None:
    track, inputs, _ = batch
    model = load_model(base_manifest, ModelConfig.of(Configuration(), track))
    share_prompts(model)
    peft = get_peft_model(model, LoraConfig(**LORA | {"target_modules": r".*visual.*\.(qkv|proj)"}))
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
        if frozen:
            weight.requires_grad_(False)
    backbone, encoded = counted(peft)
    with torch.no_grad():
        states = backbone(**inputs, use_cache=False).last_hidden_state
        with peft.disable_adapter():
            other = backbone(**inputs, use_cache=False).last_hidden_state
    assert len(encoded) == 2
    assert (states - other).abs().max() > 0.01


def test_a_trainable_vision_tower_is_passed_each_time(batch: Any, base_manifest: Any) -> None:
    track, inputs, _ = batch
    model = adapted(base_manifest, track, share=True)
    backbone, encoded = counted(model)
    weight = backbone.visual.patch_embed.proj.weight.requires_grad_()
    for _ in range(2):
        weight.grad = None
        backbone(**inputs, use_cache=False).last_hidden_state.square().sum().backward()
        assert weight.grad.abs().max() > 0
    assert len(encoded) == 2 and backbone._kept is None


def test_without_images_it_is_the_models_own_pass(batch: Any, base_manifest: Any) -> None:
    track, inputs, _ = batch
    plain, shared = adapted(base_manifest, track, False).eval(), adapted(base_manifest, track, True).eval()
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    words["input_ids"] = words["input_ids"].clamp(max=5)
    with torch.no_grad():
        assert torch.equal(shared(**words, use_cache=False).logits, plain(**words, use_cache=False).logits)


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(0, 1), min_size=5, max_size=5)), min_size=1, max_size=8
    ),
    at_least=st.integers(1, 4),
)
def test_the_prefix_that_spares_most_is_shared_by_equal_rows_alone(
    rows: list[tuple[int, list[int]]], at_least: int
) -> None:
    images = np.array([[image] for image, _ in rows])
    ids = torch.tensor([tokens for _, tokens in rows])
    shared, first, group = shared_prefix(ids, torch.ones_like(ids), images, at_least)

    def cost(length: int) -> int:
        groups = {(image, *tokens[:length]) for image, tokens in rows}
        return len(groups) * length + len(rows) * (5 - length)

    assert cost(shared) == min(cost(length) for length in range(at_least, 5))
    assert group[first].tolist() == list(range(len(first)))
    for i, j in itertools.combinations(range(len(rows)), 2):
        alike = rows[i][0] == rows[j][0] and rows[i][1][:shared] == rows[j][1][:shared]
        assert (group[i] == group[j]) == alike


def test_rows_that_differ_in_their_mask_do_not_share() -> None:
    ids = torch.zeros(2, 6, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    _, first, _ = shared_prefix(ids, mask, np.zeros((2, 1), dtype=int), 1)
    assert len(first) == 2


def test_images_are_equal_in_pixels_and_in_shape() -> None:
    pictures = [torch.tensor(values) for values in ([[1.0], [2]], [[2.0], [1]], [[1.0], [2]], [[1.0], [2]])]
    assert first_equal(tuple(pictures), [[1, 2, 1], [1, 2, 1], [1, 2, 1], [1, 1, 2]]) == [0, 1, 0, 3]
