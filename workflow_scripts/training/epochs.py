"""How long a training is: `epochs` in optimizer steps."""

import math

from workflow_scripts.configuration.model import Training


def optimizer_steps(t: Training, items: float) -> int:
    """Optimizer steps of a training: `steps`, or those of `epochs`.

    A batch of rollouts takes `prompts_per_step` items and makes `num_iterations` steps. TRL leaves out the incomplete
    batch at the end of each pass; `epochs` counts items, so the training makes up for these in one pass more.

    Args:
        t: settings of the training.
        items: number of training items.
    """
    if t.epochs is None:
        assert t.steps is not None  # validated: one of both is set
        return t.steps
    return math.ceil(t.epochs * items / t.prompts_per_step) * t.num_iterations
