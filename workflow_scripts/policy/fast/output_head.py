"""The language model's head on a CPU, whose weights of a real vocabulary are far larger than a cache."""

import torch
from transformers import PreTrainedModel

FEW = 8  # rows; of more the two products take about the same time
LARGE = 2**22  # weights


def turn_product_of_few_rows(model: PreTrainedModel) -> None:
    """Let the head of a model compute few rows by the turned product, where it is a plain linear layer."""
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        head.__class__ = TurnedLinear


class TurnedLinear(torch.nn.Linear):
    """A linear layer that multiplies its weights by a few rows, not the rows by the weights, while decoding on a CPU.

    The matrix libraries copy the second factor into the order that they read it in, which for a few rows and many
    weights takes longer than the product. A single row is multiplied twice: of a product with a vector they read the
    weights at half the speed (`python -m benchmarks.output_head`).
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """States, (..., width), to logits, (..., vocabulary); equal up to the order of sums."""
        rows = input.numel() // input.shape[-1]
        if rows > FEW or self.weight.numel() < LARGE or self.bias is not None or input.device.type != "cpu":
            return super().forward(input)
        states = input.reshape(-1, input.shape[-1])
        if rows == 1:
            states = states.repeat(2, 1)
        return (self.weight @ states.T).T[:rows].contiguous().view(*input.shape[:-1], -1)
