"""Rewards on cases written by hand, and what holds for any completion at all."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.policy.prompts import PREFERENCES, RATINGS, sampled_answer, well_formed
from workflow_scripts.training.rewards import (
    REWARDS,
    answer_advantage,
    approximate_reward,
    exact_reward,
    expected_reward,
    format_reward,
    trl_reward,
)

GOOD = "<think>two red circles, sharp.</think><answer>5</answer>"

WELL_FORMED = [
    GOOD,
    "<think>a</think> <answer>5</answer>",
    "<think>a</think>\n\n<answer>\n5\n</answer>\n",
    "  <think>a\nb\nc</think><answer> 5 </answer>  ",
    "<think>5 is less than 7 & a < b</think><answer>5</answer>",
    "<think>赤い円が二つ – très bien 🙂</think><answer>5</answer>",
]
NOT_WELL_FORMED = [
    "",
    "5",
    "<answer>5</answer>",
    "<think>a</think>",
    "<think></think><answer>5</answer>",
    "<think>a<answer>5</answer>",
    "<think>a</think><answer>5",
    "<think>a</think>5</answer>",
    "a</think><answer>5</answer>",
    "<think>a</think><answer></answer>",
    "<think>a</think><answer>five</answer>",
    "<think>a</think><answer>5.0</answer>",
    "<think>a</think><answer>05</answer>",
    "<think>a</think><answer>５</answer>",
    "<think>a</think><answer>5 6</answer>",
    "<think>a</think><answer>-5</answer>",
    "<think>a</think><answer>0</answer>",
    "<think>a</think><answer>8</answer>",
    "<think>a</think><answer>10</answer>",
    "sure: <think>a</think><answer>5</answer>",
    "<think>a</think> so <answer>5</answer>",
    "<think>a</think><answer>5</answer> done",
    "<think>a<think>b</think></think><answer>5</answer>",
    "<think><think>a</think><answer>5</answer>",
    "<think>a</think></think><answer>5</answer>",
    "<think>a<answer>4</answer></think><answer>5</answer>",
    "<think>a</think><answer>5</answer><answer>5</answer>",
    "<think>a</think><answer><answer>5</answer></answer>",
    "<answer>5</answer><think>a</think>",
    "<THINK>a</THINK><ANSWER>5</ANSWER>",
    "<think >a</think><answer>5</answer>",
    "<think>a</think><answer>5</answer><|im_end|>",
]


@pytest.mark.parametrize("completion", WELL_FORMED)
def test_format_is_rewarded(completion: str) -> None:
    assert format_reward(completion, 1, RATINGS) == 1


@pytest.mark.parametrize("completion", NOT_WELL_FORMED)
def test_format_is_not_rewarded(completion: str) -> None:
    assert format_reward(completion, 5, RATINGS) == 0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        *((completion, 5) for completion in WELL_FORMED),
        ("<answer>5</answer>", 5),
        ("no tags of thinking <answer> 5\n</answer> and more", 5),
        ("<think>a<answer>4</answer></think><answer>5</answer>", 4),  # the first answer tag is the answer
        ("<answer>3</answer><answer>5</answer>", 3),
        ("<answer>no</answer><answer>5</answer>", None),
        ("<think>a</think><answer>5", None),
        ("<answer>10</answer>", None),
        ("<answer>1 0</answer>", None),
        ("<answer>0</answer>", None),
        ("<answer>٥</answer>", None),
        ("<answer></answer>", None),
        ("</answer>5<answer>", None),
        ("5", None),
        ("", None),
    ],
)
def test_answer_is_read_from_the_first_tag(completion: str, answer: int | None) -> None:
    assert sampled_answer(completion, RATINGS) == answer


def test_answers_of_a_pair_are_0_and_1_only() -> None:
    for answer, valid in (("0", True), ("1", True), ("2", False), ("7", False), ("01", False), ("True", False)):
        completion = f"<think>a</think><answer>{answer}</answer>"
        assert format_reward(completion, 1, PREFERENCES) == valid
        assert exact_reward(completion, 1, PREFERENCES) == (answer == "1")


@pytest.mark.parametrize("target", RATINGS)
def test_ratings_are_rewarded_by_their_distance(target: int) -> None:
    for answer in RATINGS:
        completion = f"<think>a</think><answer>{answer}</answer>"
        distance = abs(answer - target)
        assert exact_reward(completion, target, RATINGS) == (distance == 0)
        assert approximate_reward(completion, target, RATINGS) == [1, 0.75, 0.5, 0, 0, 0, 0][distance]


def test_a_lucky_digit_outside_the_tags_earns_nothing() -> None:
    for completion in ("5", "<think>5</think>", "<think>5</think><answer>", "<think>a</think><answer>10</answer>"):
        for reward in (format_reward, exact_reward, approximate_reward):
            assert reward(completion, 5, RATINGS) == 0


def test_a_missing_tag_costs_the_format_reward_only() -> None:
    completion = "<think>a<answer>5</answer>"
    assert format_reward(completion, 5, RATINGS) == 0
    assert exact_reward(completion, 5, RATINGS) == approximate_reward(completion, 5, RATINGS) == 1


TAGS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<",
    ">",
    " ",
    "\n",
    "0",
    "1",
    "5",
    "7",
    "10",
    "a",
    "é",
    "😀",
    "",
]
COMPLETIONS = st.one_of(st.text(), st.lists(st.sampled_from(TAGS), max_size=12).map("".join))


@settings(deadline=None)
@given(COMPLETIONS, st.sampled_from(RATINGS))
def test_rewards_of_any_text(completion: str, target: int) -> None:
    assert format_reward(completion, target, RATINGS) in (0, 1)
    exact = exact_reward(completion, target, RATINGS)
    approximate = approximate_reward(completion, target, RATINGS)
    assert exact in (0, 1)
    assert approximate in (0, 0.5, 0.75, 1)
    assert (exact == 1) == (approximate == 1)


@settings(deadline=None)
@given(COMPLETIONS, st.sampled_from([RATINGS, PREFERENCES]))
def test_what_is_well_formed_has_an_answer(completion: str, answers: tuple[int, ...]) -> None:
    answer = sampled_answer(completion, answers)
    assert answer is None or answer in answers
    if well_formed(completion, answers):
        assert answer is not None
        assert completion.count("<think>") == completion.count("</answer>") == 1


@settings(deadline=None)
@given(st.text(min_size=1).filter(lambda text: "<" not in text), st.sampled_from(RATINGS))
def test_any_thought_without_tags_is_well_formed(thought: str, answer: int) -> None:
    completion = f"<think>{thought}</think><answer>{answer}</answer>"
    assert format_reward(completion, 1, RATINGS) == exact_reward(completion, answer, RATINGS) == 1


@pytest.mark.parametrize("answers", [RATINGS, PREFERENCES])
def test_a_certain_answer_earns_in_expectation_what_it_earns_when_sampled(answers: tuple[int, ...]) -> None:
    for target in answers:
        for answer in answers:
            certain = [0.0 if other == answer else -math.inf for other in answers]
            distance = abs(answer - target)
            assert expected_reward("exact", certain, target, answers) == (distance == 0)
            assert expected_reward("approximate", certain, target, answers) == [1, 0.75, 0.5, 0, 0, 0, 0][distance]


@settings(deadline=None)
@given(st.data(), st.sampled_from([RATINGS, PREFERENCES]), st.sampled_from(["exact", "approximate"]))
def test_the_expected_reward_is_the_expectation_of_the_sampled_one(
    data: st.DataObject, answers: tuple[int, ...], name: str
) -> None:
    target = data.draw(st.sampled_from(answers))
    logits = [data.draw(st.floats(-30, 30)) for _ in answers]
    total = math.fsum(map(math.exp, logits))
    sampled = [REWARDS[name](f"<think>a</think><answer>{answer}</answer>", target, answers) for answer in answers]
    expectation = math.fsum(math.exp(x) * reward for x, reward in zip(logits, sampled, strict=True)) / total
    found = expected_reward(name, [x - math.log(total) for x in logits], target, answers)
    assert found == pytest.approx(expectation, rel=1e-9, abs=1e-15)


def gradient_of_logits(p: list[float], answer: int) -> list[float]:
    """∇ log p(answer) with respect to the logits."""
    return [(place == answer) - chance for place, chance in enumerate(p)]


@settings(deadline=None)
@given(st.data(), st.sampled_from([RATINGS, PREFERENCES]), st.floats(0, 2), st.floats(0, 2))
def test_the_answers_advantage_has_the_gradient_of_the_expected_reward_and_the_least_variance(
    data: st.DataObject, answers: tuple[int, ...], exact: float, approximate: float
) -> None:
    """By sums over all answers: the gradient is that of Σ p(a) r(a), by autograd; other baselines vary more."""
    target = data.draw(st.sampled_from(answers))
    logits = torch.tensor([data.draw(st.floats(-4, 4)) for _ in answers], dtype=torch.double, requires_grad=True)
    weights = {"format": 1.0, "exact": exact, "approximate": approximate}
    pay = [
        exact * exact_reward(said, target, answers) + approximate * approximate_reward(said, target, answers)
        for said in (f"<think>a</think><answer>{answer}</answer>" for answer in answers)
    ]
    (logits.softmax(-1) * torch.tensor(pay, dtype=torch.double)).sum().backward()
    p = logits.softmax(-1).tolist()
    found = [answer_advantage(weights, logits.log_softmax(-1).tolist(), answer, target, answers) for answer in answers]
    scores = torch.tensor([gradient_of_logits(p, place) for place in range(len(answers))], dtype=torch.double)
    chances, advantages = torch.tensor(p, dtype=torch.double), torch.tensor(found, dtype=torch.double)[:, None]
    mean = chances @ (advantages * scores)
    assert logits.grad is not None
    torch.testing.assert_close(mean, logits.grad, atol=1e-9, rtol=0)

    def variance(shift: float) -> float:
        """Of the gradient, with another baseline, which leaves the mean as it is."""
        return float(chances @ ((advantages + shift) * scores - logits.grad).square().sum(1))

    assert all(variance(0) <= variance(shift) + 1e-12 for shift in (-0.1, -1e-3, 1e-3, 0.1))
    if answers == PREFERENCES:
        assert variance(0) < 1e-12


def test_the_answers_advantage_at_its_ends() -> None:
    """A token that is no answer earns 0, less the baseline; a certain answer has nothing to learn."""
    even = [math.log(0.5)] * 2
    assert answer_advantage({"exact": 2.0, "format": 1.0}, even, 1, 1, PREFERENCES) == pytest.approx(1)
    assert answer_advantage({"exact": 2.0, "format": 1.0}, even, 0, 1, PREFERENCES) == pytest.approx(-1)
    assert answer_advantage({"exact": 2.0, "format": 1.0}, even, None, 1, PREFERENCES) == pytest.approx(-1)
    assert answer_advantage({"exact": 1.0}, [0.0, -math.inf], 0, 0, PREFERENCES) == 0


def test_trl_is_given_the_reward_of_what_was_asked_for() -> None:
    """By the distribution the first completion earns 0.1 + 0.75 * 0.6 + 0.5 * 0.3; the second opens no answer."""
    chats = [[{"role": "assistant", "content": text}] for text in (GOOD, "<think>a")]
    logprobs = [[math.log(p) if p else -math.inf for p in (0, 0, 0.3, 0.6, 0.1, 0, 0)], []]
    batch = {"completions": chats, "target": [5, 5], "answer_logprobs": logprobs, "trainer_state": None}
    found = {
        (name, signal): trl_reward(name, RATINGS, signal)(**batch)
        for name in REWARDS
        for signal in ("sampled", "expected")
    }
    assert found == {
        ("format", "sampled"): [1, 0],
        ("format", "expected"): [1, 0],
        ("exact", "sampled"): [1, 0],
        ("exact", "expected"): pytest.approx([0.1, 0]),
        ("approximate", "sampled"): [1, 0],
        ("approximate", "expected"): pytest.approx([0.7, 0]),
    }
    assert [trl_reward(name, RATINGS, "expected").__name__ for name in REWARDS] == list(REWARDS)
