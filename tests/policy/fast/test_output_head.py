"""The head of few rows is the linear layer that it replaces, and the head of a short type does not round."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from workflow_scripts.policy.fast.enable import return_float32_logits, transpose_head
from workflow_scripts.policy.fast.output_head import FEW, LARGE, Float32Logits, TransposedLinear

WIDTH = 64
SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def heads(dtype: torch.dtype = torch.float32, bias: bool = False) -> tuple[torch.nn.Linear, TransposedLinear]:
    """A linear layer as large as a head, and the same transposed."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(WIDTH, LARGE // WIDTH, bias=bias, dtype=dtype)
    transposed = TransposedLinear(WIDTH, LARGE // WIDTH, bias=bias, dtype=dtype)
    transposed.load_state_dict(linear.state_dict())
    return linear, transposed


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 9), max_size=2), seed=st.integers(0, 2**16))
def test_logits_are_those_of_float64(shape: list[int], seed: int) -> None:
    """Of any number of rows and of sequences of rows; contiguous, as a linear layer's."""
    linear, transposed = heads()
    states = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))
    exact = states.double() @ linear.weight.double().T
    logits = transposed(states)
    assert logits.shape == linear(states).shape and logits.is_contiguous()
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
def test_gradients_are_the_linear_layer_s(rows: int) -> None:
    """Of states and of weights."""
    linear, transposed = heads()
    grads = []
    for head in (linear, transposed):
        states = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (head(states) ** 2).mean().backward()
        grads.append((states.grad, head.weight.grad))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize(("rows", "bias"), [(FEW + 1, False), (4, True)])
def test_all_else_is_left_to_the_linear_layer(rows: int, bias: bool) -> None:
    """Many rows, a bias: the same bits."""
    linear, transposed = heads(bias=bias)
    states = torch.randn(rows, WIDTH)
    assert torch.equal(transposed(states), linear(states))


class Model(torch.nn.Module):
    """A model with this output head."""

    def __init__(self, head: torch.nn.Module | None) -> None:
        super().__init__()
        self.head = head

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return self.head


def test_only_a_plain_linear_head_is_changed() -> None:
    """A head of a class of its own, as an adapter's, keeps it; float32 and shorter types have their own."""

    class Adapted(torch.nn.Linear):
        pass

    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for head in (torch.nn.Linear(2, 2, dtype=dtype), Adapted(2, 2, dtype=dtype), None):
            return_float32_logits(Model(head))  # type: ignore[arg-type]
            transpose_head(Model(head))  # type: ignore[arg-type]
            found.append(type(head))
    assert found == [TransposedLinear, Adapted, type(None), Float32Logits, Adapted, type(None)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_short_type_are_those_of_float64(dtype: torch.dtype, bias: bool, autocast: bool) -> None:
    """Also under autocast, which trainings decode under, and of states in another type."""
    torch.manual_seed(0)
    head = torch.nn.Linear(3000, 500, bias=bias, dtype=dtype)  # in several blocks
    rounded = torch.nn.Linear.forward(head, states := 20 * torch.randn(2, 3, 3000, dtype=dtype))
    return_float32_logits(Model(head))  # type: ignore[arg-type]
    exact = states.double() @ head.weight.double().T + (head.bias.double() if bias else 0)
    assert (rounded.double() - exact).abs().max() > 1e-3
    for same in (states, states.float()):
        with torch.autocast("cpu", enabled=autocast):
            logits = head(same)
        assert logits.dtype == torch.float32 and logits.is_contiguous()
        torch.testing.assert_close(logits.double(), exact, atol=1e-4, rtol=0)


def test_an_adapter_of_the_head_adds_to_float32_logits() -> None:
    torch.manual_seed(0)
    plain = torch.nn.ModuleDict({"head": torch.nn.Linear(64, 100, bias=False, dtype=torch.bfloat16)})
    return_float32_logits(Model(plain["head"]))  # type: ignore[arg-type]
    adapted: Any = get_peft_model(plain, LoraConfig(target_modules=["head"], init_lora_weights=False))
    (layer,) = (module for module in adapted.modules() if isinstance(module, LoraLayer))
    down, up = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
    states = 20 * torch.randn(5, 64, dtype=torch.bfloat16)
    weights = layer.get_base_layer().weight.double() + layer.scaling["default"] * up @ down
    logits = adapted.base_model.model["head"](states)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), states.double() @ weights.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("made", "config", "after"),
    [
        (Gemma2ForCausalLM, Gemma2Config(final_logit_softcapping=30.0, **SMALL), lambda x: 30 * torch.tanh(x / 30)),
        (CohereForCausalLM, CohereConfig(logit_scale=0.3, **SMALL), lambda x: 0.3 * x),
    ],
)
@torch.no_grad()
def test_what_a_model_does_to_its_logits_is_in_float32_too(made: Any, config: Any, after: Any) -> None:
    torch.manual_seed(0)
    model = made(config).bfloat16().eval()
    torch.nn.init.normal_(model.lm_head.weight)
    return_float32_logits(model)
    states: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    logits = model(torch.tensor([[5, 6, 7]])).logits
    exact = after(states[0].double() @ model.lm_head.weight.double().T)
    assert logits.dtype == torch.float32 and exact.abs().max() > 4
    torch.testing.assert_close(logits.double(), exact, atol=1e-4, rtol=0)
