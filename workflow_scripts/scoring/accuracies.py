"""Accuracies of one policy on one test set under every rule: Mean@k, tied scores, tied ranks, missing answers."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from workflow_scripts.scoring.bootstrap import Credit, accuracy_intervals
from workflow_scripts.scoring.judged_prompts import METHODS, JudgedPrompt
from workflow_scripts.scoring.mean_at_k import fill_missing
from workflow_scripts.scoring.pair_accuracy import TieRule
from workflow_scripts.scoring.protocols import (
    Average,
    LabelTieRule,
    MissingAnswerRule,
    Outcomes,
    Protocol,
    first_listed,
    outcome_credit,
    prompt_outcomes,
)

LABELS, NOISE_FREE = "labels", "noise-free order"  # what scores are measured against
AVERAGES: tuple[Average, ...] = ("micro", "macro")
TIES: tuple[TieRule, ...] = ("wrong", "half", "dropped", "right")
MISSING: tuple[MissingAnswerRule, ...] = ("wrong", "neutral", "dropped")

Arrays = list[NDArray[np.float64]]  # one for each prompt


class Rule(NamedTuple):
    """Whose scores are measured, how, and what counts as right."""

    method: str
    k: int
    against: str
    tie: TieRule
    label_tie: LabelTieRule
    missing: MissingAnswerRule


class Measurement(NamedTuple):
    """A rule with what it is applied to."""

    rule: Rule
    scores: Arrays
    """(N, K) of each prompt."""
    ranks: Arrays
    """(N,) of each prompt."""


def measurements(
    prompts: Sequence[JudgedPrompt],
    true_ranks: Mapping[str, float],
    official: Protocol,
    report_k: Sequence[int],
    missing_answer: MissingAnswerRule,
) -> list[Measurement]:
    """List everything that is measured: the policy under every rule, and the baselines under one each.

    Args:
        prompts: of the test set; all have ranks.
        true_ranks: noise-free rank of each image; empty for published data.
        official: protocol of the test set.
        report_k: values of k.
        missing_answer: configured rule for missing answers; where `official` counts tied ranks, they count under it.
    """
    orders: dict[str, Arrays] = {LABELS: [prompt.ranks for prompt in prompts]}
    if true_ranks:
        orders[NOISE_FREE] = [np.array([true_ranks[image] for image in prompt.image_ids]) for prompt in prompts]
    found = []
    for method, (against, ranks), k in itertools.product(METHODS, orders.items(), report_k):
        scores = [prompt.scores[method] for prompt in prompts]
        rules = [Rule(method, k, against, tie, "dropped", missing) for tie in TIES for missing in MISSING]
        if against == LABELS and official.label_tie == "right":
            rules.append(Rule(method, k, against, official.tie, "right", missing_answer))
        found += [Measurement(rule, scores, ranks) for rule in rules]
    listed = [first_listed(len(prompt.image_ids)) for prompt in prompts]
    for against, ranks in orders.items():
        found.append(Measurement(Rule("first listed", 1, against, "wrong", "dropped", "wrong"), listed, ranks))
    if annotators := [-prompt.annotations.T for prompt in prompts if prompt.annotations is not None]:
        rule = Rule("single annotator", 1, LABELS, official.tie, official.label_tie, "wrong")
        found.append(Measurement(rule, annotators, orders[LABELS]))
    if true_ranks:
        # Equal utilities are ordered by chance: half a point is what a scorer without ties can expect.
        rule = Rule(NOISE_FREE, 1, LABELS, "half", official.label_tie, "wrong")
        found.append(Measurement(rule, [-ranks[:, None] for ranks in orders[NOISE_FREE]], orders[LABELS]))
    return found


def credits_of(measured: Sequence[Measurement], neutral: float) -> list[Credit]:
    """Credit and counted pairs of each prompt, (n_prompts,) float64 each, by every measurement.

    Args:
        measured: as `measurements` returns them.
        neutral: the score that prefers nothing, put in the place of missing ones by the rule "neutral".
    """
    compared: dict[tuple[str, str, int, bool], Outcomes] = {}  # the rules for ties and missing answers share it
    found = []
    for rule, scores, ranks in measured:
        filled = rule.missing == "neutral"
        key = (rule.method, rule.against, rule.k, filled)
        if key not in compared:
            complete = not any(np.isnan(one).any() for one in scores)
            values = [fill_missing(one, neutral) for one in scores] if filled else scores
            compared[key] = prompt_outcomes(values, ranks, rule.k)
            if complete:
                compared[*key[:3], not filled] = compared[key]
        missing = "wrong" if rule.missing == "neutral" else rule.missing
        found.append(outcome_credit(compared[key], rule.tie, rule.label_tie, missing))
    return found


def cells(
    rules: Sequence[Rule], credits: Sequence[Credit], confidence: float, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Each rule with its accuracy, micro and macro: estimate, standard_error, low and high, and the number of pairs.

    Null stands where no pair counts, as when one answer was given throughout and ties are dropped. The last three
    arguments are those of `bootstrap.accuracy_intervals`.
    """
    intervals = [accuracy_intervals(credits, average, confidence, resamples, seed) for average in AVERAGES]
    found = []
    for rule, (_, pairs), *by_average in zip(rules, credits, *intervals, strict=True):
        for average, interval in zip(AVERAGES, by_average, strict=True):
            numbers = {name: None if np.isnan(value) else value for name, value in interval._asdict().items()}
            found.append({**rule._asdict(), "average": average, **numbers, "pairs": float(pairs.sum())})
    return found
