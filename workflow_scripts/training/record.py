"""The record of a training: its curves, the step that is kept, and whether the policy collapsed."""

import math
from collections.abc import Callable
from itertools import chain, islice, repeat
from statistics import fmean
from typing import Any

from trl.trainer.utils import RepeatSampler

from workflow_scripts.configuration.model import Training
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.training.settings import BEST, DIFFERENCE
from workflow_scripts.training.trainer import CREDIT
from workflow_scripts.training.validation import paired_difference

# Mean |log-probability sampled - scored| that rounding explains. With 28 random layers, far less certain of a token
# than a trained policy (2.8 nats of entropy), it was 0.042 in bfloat16 and 7e-6 in float32; float16 rounds to an
# eighth. Attention scores around 80, rounded to bfloat16 before the soft-max, made it 0.13.
EXPLAINED = {"float32": 1e-4, "float16": 0.006, "bfloat16": 0.05}


def trained_on(t: Training, steps: int, items: int, seed: int) -> dict[str, float]:
    """How much a training sees: its steps, items available and seen, and epochs.

    Args:
        t: settings of the training.
        steps: optimizer steps.
        items: number of items available: those with readable images whose question fits into the context.
        seed: of the training.

    Returns:
        `items_seen` counts each item once, in the order of TRL's sampler. `epochs` is the number of items drawn, each
        time counted, over those available.
    """
    drawn = math.ceil(steps / t.num_iterations) * t.prompts_per_step
    passes = repeat(RepeatSampler(range(items), mini_repeat_count=1, batch_size=t.prompts_per_step, seed=seed))
    seen = set(islice(chain.from_iterable(passes), drawn))
    return {"steps": steps, "items_available": items, "items_seen": len(seen), "epochs": drawn / items}


def training_record(
    config: TrainGrpo, log_history: list[dict[str, Any]], kept_step: int, warn: Callable[[str], None]
) -> dict[str, Any]:
    """Record a training by the trainer's log, without times and speeds, which differ from run to run.

    Warns if the kept adapter does not validate better than the base policy, if it gives nearly always one answer, and
    if the policy that samples differs from the one that is trained.
    `selection_se` is the largest standard error of the paired difference between the validation of the kept adapter and
    another; it is undefined with one prompt.
    """
    entries = [entry for entry in log_history if "train_loss" not in entry]  # that entry sums up times and speeds
    history = [{k: v for k, v in entry.items() if "time" not in k and k != CREDIT} for entry in entries]
    validations = {entry["step"]: entry for entry in history if BEST in entry}
    kept, untrained = validations[kept_step], validations[0][BEST]
    credit = {entry["step"]: entry[CREDIT] for entry in entries if CREDIT in entry}
    others = [paired_difference(credit[step], credit[kept_step]) for step in credit if step != kept_step]
    selection_se = max(error for _, error in others)
    if kept[BEST] <= untrained:
        warn(
            f"{config.track}, seed {config.seed}: the kept adapter does not validate better than the base policy "
            f"({kept[BEST]:.3f} against {untrained:.3f})"
        )
    collapsed = kept["eval_largest_answer_share"] > config.training.collapse_share
    if collapsed:
        warn(
            f"{config.track}, seed {config.seed}: the policy has collapsed, one answer makes up "
            f"{kept['eval_largest_answer_share']:.0%} of its validation rollouts"
        )
    differences = [entry[f"{DIFFERENCE}/mean"] for entry in history if f"{DIFFERENCE}/mean" in entry]
    explained = EXPLAINED[config.model.dtype]
    if differences and fmean(differences) > explained:
        generation = config.training.generation
        warn(
            f"{config.track}, seed {config.seed}: the log-probabilities of sampled tokens differ by "
            f"{fmean(differences):.2g} on average from those that the trainer scores, and rounding to "
            f"{config.model.dtype} explains {explained}; the trained policy is not the sampled one; set "
            f"training.{config.track}.generation to {'trl' if generation == 'transformers' else 'transformers'}"
        )
    return {
        "kept_step": kept_step,
        "kept_soft_pair_accuracy": kept[BEST],
        "untrained_soft_pair_accuracy": untrained,
        "selection_se": None if math.isnan(selection_se) else selection_se,
        "collapsed": collapsed,
        "history": history,
    }
