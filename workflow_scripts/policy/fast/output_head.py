"""Output heads: float32 logits for shorter weights, and a faster product for float32 weights on a CPU."""

import torch

FEW = 8  # rows; for more, both products take about the same time
LARGE = 2**22  # weights
BLOCK = 2**19  # weights; their float32 copy stays in the cache of a CPU


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


class Float32Logits(torch.nn.Linear):
    """A linear layer of bfloat16 or float16 weights whose products are summed and returned in float32.

    Rounded to bfloat16, logits from 16 to 32 are multiples of 0.125, so that answers tie which the states tell apart.
    What a model does to its logits afterwards, such as a cap, a scale or an adapter of the head, is in float32 too.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map states, (..., width), to logits, (..., vocabulary) float32."""
        states = input.reshape(-1, input.shape[-1])
        with torch.autocast(input.device.type, enabled=False):
            if input.is_cuda and input.dtype == self.weight.dtype:
                logits = torch.mm(states, self.weight.T, out_dtype=torch.float32)
            else:  # no such product: the weights are converted block by block
                columns = states.float().T
                blocks = self.weight.split(max(1, BLOCK // input.shape[-1]))
                logits = torch.cat([block.float() @ columns for block in blocks]).T.contiguous()
        if self.bias is not None:
            logits = logits + self.bias.float()
        return logits.view(*input.shape[:-1], -1)
