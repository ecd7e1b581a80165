"""The head of few rows is the linear layer that it replaces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.policy.fast.enable import transpose_head
from workflow_scripts.policy.fast.output_head import FEW, LARGE, TransposedLinear

WIDTH = 64


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


def test_only_a_plain_linear_head_is_transposed() -> None:
    """A head of a class of its own, as an adapter's, keeps it."""

    class Adapted(torch.nn.Linear):
        pass

    class Model(torch.nn.Module):
        def __init__(self, head: torch.nn.Module | None) -> None:
            super().__init__()
            self.head = head

        def get_output_embeddings(self) -> torch.nn.Module | None:
            return self.head

    found = []
    for head in (torch.nn.Linear(2, 2), Adapted(2, 2), None):
        transpose_head(Model(head))  # type: ignore[arg-type]
        found.append(type(head))
    assert found == [TransposedLinear, Adapted, type(None)]
