"""Rewards of GRPO training as pure functions of one completion (paper §4)."""

from collections.abc import Callable
from typing import Any

from workflow_scripts.policy.prompts import sampled_answer, well_formed

APPROXIMATE = {0: 1.0, 1: 0.75, 2: 0.5}


def format_reward(completion: str, target: int, answers: tuple[int, ...]) -> float:
    """1 for `<think>…</think><answer>N</answer>` with a valid N and nothing around it, else 0."""
    return float(well_formed(completion, answers))


def exact_reward(completion: str, target: int, answers: tuple[int, ...]) -> float:
    """1 where the answer is the target, else 0."""
    return float(sampled_answer(completion, answers) == target)


def approximate_reward(completion: str, target: int, answers: tuple[int, ...]) -> float:
    """1, 0.75, 0.5 where the answer is 0, 1, 2 away from the target, else 0."""
    answer = sampled_answer(completion, answers)
    return 0.0 if answer is None else APPROXIMATE.get(abs(answer - target), 0.0)


REWARDS = {"format": format_reward, "exact": exact_reward, "approximate": approximate_reward}


def trl_reward(name: str, answers: tuple[int, ...]) -> Callable[..., list[float]]:
    """Reward of this name as TRL calls it: with the completions of a batch, as chats, and the column `target`."""

    def reward(completions: list[Any], target: list[int], **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [REWARDS[name](text, goal, answers) for text, goal in zip(texts, target, strict=True)]

    reward.__name__ = name
    return reward
