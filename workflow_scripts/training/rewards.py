"""Rewards of GRPO training as pure functions of one completion (paper §4)."""

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
