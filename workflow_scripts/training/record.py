"""The record of a training: its curves, its best step, and whether the policy collapsed."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.training.settings import BEST, DIFFERENCE

# Mean |log-probability sampled - scored| that rounding explains. With 28 random layers, far less certain of a token
# than a trained policy (2.8 nats of entropy), it was 0.042 in bfloat16 and 7e-6 in float32; float16 rounds to an
# eighth. Attention scores around 80, rounded to bfloat16 before the soft-max, made it 0.13.
EXPLAINED = {"float32": 1e-4, "float16": 0.006, "bfloat16": 0.05}


def training_record(
    config: TrainGrpo, log_history: list[dict[str, Any]], best_step: int, warn: Callable[[str], None]
) -> dict[str, Any]:
    """Record a training by the trainer's log, without times and speeds, which differ from run to run.

    Warns if no adapter validates better than the base policy, if the best one gives nearly always one answer, and if
    the policy that samples differs from the one that is trained.
    """
    entries = [entry for entry in log_history if "train_loss" not in entry]  # that entry sums up times and speeds
    history = [{k: v for k, v in entry.items() if "time" not in k} for entry in entries]
    validations = {entry["step"]: entry for entry in history if BEST in entry}
    best, untrained = validations[best_step], validations[0][BEST]
    if best[BEST] <= untrained:
        warn(
            f"{config.track}, seed {config.seed}: no adapter validates better than the base policy "
            f"({best[BEST]:.3f} against {untrained:.3f})"
        )
    collapsed = best["eval_largest_answer_share"] > config.training.collapse_share
    if collapsed:
        warn(
            f"{config.track}, seed {config.seed}: the policy has collapsed, one answer makes up "
            f"{best['eval_largest_answer_share']:.0%} of its validation rollouts"
        )
    differences = [entry[f"{DIFFERENCE}/mean"] for entry in history if f"{DIFFERENCE}/mean" in entry]
    if differences and fmean(differences) > EXPLAINED[config.model.dtype]:
        generation = config.training.generation
        warn(
            f"{config.track}, seed {config.seed}: the log-probabilities of sampled tokens differ by "
            f"{fmean(differences):.2g} on average from those that are trained, and rounding to {config.model.dtype} "
            f"explains {EXPLAINED[config.model.dtype]}; another policy is trained than samples; set "
            f"training.{config.track}.generation to {'trl' if generation == 'transformers' else 'transformers'}"
        )
    return {
        "best_step": best_step,
        "best_soft_pair_accuracy": best[BEST],
        "untrained_soft_pair_accuracy": untrained,
        "collapsed": collapsed,
        "history": history,
    }
