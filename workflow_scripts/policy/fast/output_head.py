"""The output head on a CPU, where the weights for a real vocabulary are far larger than the caches."""

import torch

FEW = 8  # rows; for more, both products take about the same time
LARGE = 2**22  # weights


class TransposedLinear(torch.nn.Linear):
    """A linear layer that computes (W xᵀ)ᵀ instead of x Wᵀ for a few rows on a CPU.

    Matrix libraries copy the second factor into the layout that they read. For a few rows and many weights that copy
    takes longer than the product. A single row is doubled, because the matrix-vector product reads the weights at half
    the speed.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map states, (..., width), to logits, (..., vocabulary); equal up to the order of sums."""
        rows = input.numel() // input.shape[-1]
        if rows > FEW or self.weight.numel() < LARGE or self.bias is not None or input.device.type != "cpu":
            return super().forward(input)
        states = input.reshape(-1, input.shape[-1])
        if rows == 1:
            states = states.repeat(2, 1)
        return (self.weight @ states.T).T[:rows].contiguous().view(*input.shape[:-1], -1)
