"""The record of a training: its curves, its best step, and whether the policy collapsed."""

from collections.abc import Callable
from typing import Any

from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.training.settings import BEST


def training_record(
    config: TrainGrpo, log_history: list[dict[str, Any]], best_step: int, warn: Callable[[str], None]
) -> dict[str, Any]:
    """Record a training by the trainer's log, without times and speeds, which differ from run to run.

    Warns if no adapter validates better than the base policy, and if the best one gives nearly always one answer.
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
    return {
        "best_step": best_step,
        "best_soft_pair_accuracy": best[BEST],
        "untrained_soft_pair_accuracy": untrained,
        "collapsed": collapsed,
        "history": history,
    }
