"""Validation during training: the share of image pairs that the policy orders as the annotators did."""

import contextlib
import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from numpy.typing import NDArray

from workflow_scripts.configuration.model import Sampling
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.policy.loading import Policy
from workflow_scripts.policy.prompts import ANSWERS
from workflow_scripts.rollouts.items import Item
from workflow_scripts.rollouts.transformers_engine import generate
from workflow_scripts.scoring.pair_accuracy import expected_answer, pair_accuracy, pair_credit
from workflow_scripts.training.generation import adapter_merged
from workflow_scripts.training.items import Split, training_items
from workflow_scripts.training.settings import BEST, processes_of, strategy_of

Credit = list[list[float]]
"""[right pairs, pairs] of each validation prompt, always in the same order."""


@dataclass(frozen=True)
class Validation:
    """Validation of the policy in training; calling it with the model returns the metrics and the prompts' credit."""

    config: TrainGrpo
    policy: Policy
    split: Split
    items: list[tuple[Item, int]]
    sampling: Sampling
    rank: int
    """Index of this process."""

    def __call__(self, model: Any, untrained: Credit | None) -> tuple[dict[str, float], Credit]:
        """Accuracy, and the shares of forced answers and of each answer, over rollouts of the validation items.

        Args:
            model: the policy.
            untrained: credit of the validation before the first step, which the accuracy is compared with.
        """
        rollouts = self._rollouts(model)
        counts = Counter(str(rollout["sampled_answer"]) for rollout in rollouts)
        answers = (*self.policy.answers, None)
        credit = np.column_stack(soft_pair_credit(rollouts, self.split.rows, self.config)).tolist()
        return {
            **accuracy_metrics(credit, untrained),
            "eval_forced_share": float(np.mean([rollout["forced"] for rollout in rollouts])),
            "eval_largest_answer_share": max(counts.values()) / len(rollouts),
            **{f"eval_answer_share/{answer}": counts[str(answer)] / len(rollouts) for answer in answers},
        }, credit

    def _rollouts(self, model: Any) -> list[dict[str, Any]]:
        """Rollouts of all validation items.

        Processes that each hold the whole model divide the items. With FSDP every forward pass involves all processes,
        so each validates all items, in step with the others.
        """
        config, t = self.config, self.config.training
        processes, fsdp = processes_of(config), strategy_of(config) == "fsdp"
        divided = processes > 1 and not fsdp
        items = self.items[self.rank :: processes] if divided else self.items
        with contextlib.nullcontext() if fsdp else adapter_merged(model, config.model.dtype):
            rollouts = list(
                generate(
                    dataclasses.replace(self.policy, model=model),
                    [item for item, _ in items],
                    self.split.images,
                    rollouts=t.validation_rollouts,
                    first_k=0,
                    sampling=self.sampling,
                    batch_items=t.prompts_per_step * t.group_size // 2,
                    seed=f"validation {config.seed}" + (f" rank {self.rank}" if divided and self.rank else ""),
                )
            )
        return list(gather_object(rollouts)) if divided else rollouts


def accuracy_metrics(credit: Credit, untrained: Credit | None) -> dict[str, float]:
    """Accuracy, and its gain over that of the untrained policy, each with its standard error over prompts.

    Args:
        credit: of a validation.
        untrained: of the validation before the first step, if this is a later one.

    Returns:
        Fractions of 1 by name of the metric; an error only where it is defined, with two prompts or more.
    """
    found = dict(zip((BEST, f"{BEST}_se"), pair_accuracy(*np.transpose(credit)), strict=True))
    if untrained:
        names = (f"{BEST}_gain", f"{BEST}_gain_se")
        found |= dict(zip(names, paired_difference(untrained, credit), strict=True))
    return {name: value for name, value in found.items() if name == BEST or not math.isnan(value)}


def paired_difference(first: Credit, second: Credit) -> tuple[float, float]:
    """Accuracy of the second of two validations minus that of the first, with its standard error over prompts."""
    (before, pairs), (after, _) = np.transpose(first), np.transpose(second)
    return pair_accuracy(after - before, pairs)


def soft_pair_credit(
    rollouts: list[dict[str, Any]], rows: list[dict[str, Any]], config: TrainGrpo
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pairs of each validation prompt that the soft score orders as the annotator did, and all its pairs.

    A tied score counts as wrong.
    """
    answers = ANSWERS[config.model.protocol]
    scores: dict[str, list[float]] = {}
    for rollout in rollouts:
        scores.setdefault(rollout["item_id"], []).append(float(expected_answer(rollout["answer_logprobs"], answers)))
    mean = {name: float(np.mean(values)) for name, values in scores.items()}
    if config.model.protocol == "pointwise":
        return pair_credit(
            [[mean.get(f"{row['prompt_id']}/{image}", math.nan) for image in row["image_ids"]] for row in rows],
            [row["ranks"] for row in rows],
        )
    items = training_items(rows, {name for item in mean for name in item.split("/")[1:]}, "pairwise", config.seed)
    # A pair is a prompt with two images: the neutral 0.5 for the first, and p(1) for the second.
    correct, pairs = pair_credit(
        [[0.5, mean[item.item_id]] for item, _ in items], [[target, 1 - target] for _, target in items]
    )
    _, prompt = np.unique([item.prompt_id for item, _ in items], return_inverse=True)
    return np.bincount(prompt, correct).astype(np.float64), np.bincount(prompt, pairs).astype(np.float64)
