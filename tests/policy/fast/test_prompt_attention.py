"""Attention to shared prompts in bfloat16 against float64 and float32: no worse than scaled dot-product attention."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from workflow_scripts.policy.fast.enable import share_prompts
from workflow_scripts.policy.fast.prompt_attention import PROMPT_ONCE, PromptStates, attention
from workflow_scripts.rollouts.decoding import Decoding

OFFSETS = [0, 10, 30, 100]  # mean score before the soft-max; keys of Qwen2.5 reach 175
DRAWS, LARGEST_RATIO = 20, 1.1
PROMPTS, ROLLOUTS, KEY_HEADS, HEADS, WIDTH = 2, 3, 2, 2, 64


def states(generator: torch.Generator, *shape: int, along: torch.Tensor, offset: float) -> torch.Tensor:
    """Random states with a common part along a direction, in bfloat16."""
    return (torch.randn(*shape, WIDTH, generator=generator) + offset * along).bfloat16()


def errors(offset: float, seed: int, autocast: bool) -> tuple[float, float]:
    """Relative error of attention to shared prompts, perhaps under autocast, and of SDPA, against float64."""
    generator = torch.Generator().manual_seed(seed)
    along = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)
    rows = PROMPTS * ROLLOUTS
    query = states(generator, rows, KEY_HEADS * HEADS, 1, along=along, offset=WIDTH**0.5)
    keys = [states(generator, n, KEY_HEADS, t, along=along, offset=offset) for n, t in ((PROMPTS, 40), (rows, 9))]
    values = [states(generator, n, KEY_HEADS, t, along=along, offset=0) for n, t in ((PROMPTS, 40), (rows, 9))]
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=keys[0], values=values[0])])
    prompts = PromptStates(cache, torch.ones(PROMPTS, 40), ROLLOUTS)
    module = SimpleNamespace(layer_idx=0)
    with torch.autocast("cpu", enabled=autocast):
        found = attention(module, query, keys[1], values[1], None, prompts=prompts)[0].transpose(1, 2)
    assert found.dtype == torch.bfloat16

    whole = [
        torch.cat([shared.repeat_interleave(ROLLOUTS, 0), own], 2).repeat_interleave(HEADS, 1)
        for shared, own in (keys, values)
    ]
    exact = torch.nn.functional.scaled_dot_product_attention(query.double(), *(one.double() for one in whole))
    plain = torch.nn.functional.scaled_dot_product_attention(query, *whole)
    ours, theirs = ((one.double() - exact).norm() / exact.norm() for one in (found, plain))
    return float(ours), float(theirs)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_large_keys_lose_no_more_than_in_sdpa(offset: float, autocast: bool) -> None:
    ours, theirs = torch.tensor([errors(offset, seed, autocast) for seed in range(DRAWS)]).mean(0)
    assert 0 < ours <= LARGEST_RATIO * theirs


def model(offset: float, seed: int, dtype: torch.dtype) -> Any:
    """A random Qwen2.5-VL of six layers whose keys have a large bias."""
    torch.manual_seed(seed)
    text = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen2_5_VLConfig(text_config={**text, **heads}, vision_config=vision, attn_implementation="sdpa")
    made = Qwen2_5_VLForConditionalGeneration(config).eval()
    for name, weights in made.named_parameters():
        if "language_model" in name and name.endswith("k_proj.bias"):
            torch.nn.init.normal_(weights, std=offset)
        elif "language_model" in name and name.endswith("_proj.weight"):
            torch.nn.init.normal_(weights, std=0.2)
    return made.to(dtype)


@torch.no_grad()
def divergences(offset: float, seed: int) -> tuple[float, float]:
    """KL divergence from the float32 model of the bfloat16 model, with shared prompts and with SDPA alone."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(0, 200, (PROMPTS, 30), generator=generator)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    shared = model(offset, seed, torch.bfloat16)
    share_prompts(shared)
    assert shared.get_decoder().config._attn_implementation == PROMPT_ONCE
    # The float32 model has the rounded weights, so that nothing but the arithmetic differs.
    plain = model(offset, seed, torch.bfloat16)
    decodings = [
        Decoding(one, inputs, ROLLOUTS) for one in (shared, plain, model(offset, seed, torch.bfloat16).float())
    ]
    sums = torch.zeros(2, dtype=torch.double)
    for _ in range(4):
        tokens = torch.randint(0, 200, (PROMPTS * ROLLOUTS,), generator=generator).tolist()
        for one in decodings:
            one.step(range(len(tokens)), tokens)
        *ours, exact = (one.logits.double().log_softmax(-1) for one in decodings)
        sums += torch.stack([(exact.exp() * (exact - one)).sum(-1).mean() for one in ours])
    return float(sums[0]), float(sums[1])


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_next_token_is_drawn_as_well_as_with_sdpa(offset: float) -> None:
    ours, theirs = torch.tensor([divergences(offset, seed) for seed in range(DRAWS)]).mean(0)
    assert 0 < ours <= LARGEST_RATIO * theirs
