"""The head of a real vocabulary on one thread: rows by weights, as a linear layer computes, against weights by rows.

python -m benchmarks.output_head
"""

from functools import partial

import torch

from benchmarks.measuring import contest, write_rows
from workflow_scripts.policy.fast.output_head import TransposedLinear

VOCABULARY, WIDTHS, ROWS = 151_936, (512, 2048), (1, 2, 4, 8, 12, 16, 32, 64)


@torch.no_grad()
def main() -> None:
    """Measure, and write results/output_head.csv."""
    torch.set_num_threads(1)
    found = []
    for width in WIDTHS:
        linear = torch.nn.Linear(width, VOCABULARY, bias=False)
        turned = TransposedLinear(width, VOCABULARY, bias=False)
        turned.weight = linear.weight
        for rows in ROWS:
            states = torch.randn(rows, 1, width)
            works = {"linear": partial(linear, states), "turned": partial(turned, states)}
            for row in contest(works):
                found.append({"width": width, "rows_of_states": rows, **row})
                print(found[-1], flush=True)
    write_rows("output_head", found)


if __name__ == "__main__":
    main()
