"""Rewards of GRPO training as pure functions of one completion (paper §4), or of its distribution over the answers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from workflow_scripts.policy.prompts import sampled_answer, well_formed

# Reward of an answer by its distance from the target; 0 where none is given.
CREDIT = {"exact": {0: 1.0}, "approximate": {0: 1.0, 1: 0.75, 2: 0.5}}


def format_reward(completion: str, target: int, answers: tuple[int, ...]) -> float:
    """1 for `<think>…</think><answer>N</answer>` with a valid N and nothing around it, else 0."""
    return float(well_formed(completion, answers))


def exact_reward(completion: str, target: int, answers: tuple[int, ...]) -> float:
    """1 where the answer is the target, else 0."""
    return _credit("exact", sampled_answer(completion, answers), target)


def approximate_reward(completion: str, target: int, answers: tuple[int, ...]) -> float:
    """1, 0.75, 0.5 where the answer is 0, 1, 2 away from the target, else 0."""
    return _credit("approximate", sampled_answer(completion, answers), target)


def _credit(name: str, answer: int | None, target: int) -> float:
    return 0.0 if answer is None else CREDIT[name].get(abs(answer - target), 0.0)


def expected_reward(name: str, answer_logprobs: Sequence[float], target: int, answers: tuple[int, ...]) -> float:
    """Reward `exact` or `approximate` in expectation over the answers, Σ p(a) credit(|a - target|), with p as in §3.

    Args:
        name: of the reward.
        answer_logprobs: log p of each answer; empty if the completion opens no answer, which earns 0.
        target: answer of the annotator.
        answers: valid answers.
    """
    if not answer_logprobs:
        return 0.0
    return sum(math.exp(p) * _credit(name, a, target) for p, a in zip(answer_logprobs, answers, strict=True))


def answer_advantage(
    weights: Mapping[str, float],
    answer_logprobs: Sequence[float],
    answer: int | None,
    target: int,
    answers: tuple[int, ...],
) -> float:
    """Advantage of the sampled answer, r(a) - b, whose mean gradient is that of the expected reward, Σ p(a) r(a).

    The baseline b = Σ p(a) w(a) r(a) / Σ p(a) w(a) has the least variance of the gradient with respect to the answers'
    logits; w(a) = 1 - 2 p(a) + Σ p² is the squared norm of ∇ log p(a) there. Between two answers none is left.

    Args:
        weights: weight of each reward, by name.
        answer_logprobs: log p of each answer.
        answer: sampled one; None for a token that is no answer, which earns 0.
        target: answer of the annotator.
        answers: valid answers.
    """
    rewards = [
        sum(weight * _credit(name, a, target) for name, weight in weights.items() if name in CREDIT) for a in answers
    ]
    p = [math.exp(logprob) for logprob in answer_logprobs]
    squares = math.fsum(chance * chance for chance in p)
    norms = [chance * (1 - 2 * chance + squares) for chance in p]
    if not (total := math.fsum(norms)):
        return 0.0  # a certain answer, which has no gradient
    baseline = math.fsum(norm * reward for norm, reward in zip(norms, rewards, strict=True)) / total
    return (0.0 if answer is None else rewards[answers.index(answer)]) - baseline


REWARDS = {"format": format_reward, "exact": exact_reward, "approximate": approximate_reward}


def trl_reward(name: str, answers: tuple[int, ...], signal: str) -> Callable[..., list[float]]:
    """Reward of this name as TRL calls it: with what it has of a batch, such as the column `target`, by keyword.

    Args:
        name: of the reward.
        answers: valid answers.
        signal: "sampled" judges the completions, which are chats; "expected" judges the column `answer_logprobs` of the
            rollouts, where the reward depends on the answer alone.
    """

    def sampled(completions: list[Any], target: list[int], **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [REWARDS[name](text, goal, answers) for text, goal in zip(texts, target, strict=True)]

    def expected(answer_logprobs: list[list[float]], target: list[int], **_: Any) -> list[float]:
        return [expected_reward(name, p, goal, answers) for p, goal in zip(answer_logprobs, target, strict=True)]

    reward = expected if signal == "expected" and name in CREDIT else sampled
    reward.__name__ = name
    return reward
