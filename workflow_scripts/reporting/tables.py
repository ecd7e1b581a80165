"""The paper's tables from measured accuracies: table1, table2, the comparisons behind them, and sensitivity."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from workflow_scripts.configuration.stages import MakeTables
from workflow_scripts.reporting.wording import (
    HEADS,
    METHODS,
    POLICIES,
    TRAINED_ON,
    dataset_titles,
    table_titles,
    track_titles,
    with_interval,
)
from workflow_scripts.scoring.accuracies import LABELS, NOISE_FREE, Rule
from workflow_scripts.scoring.bootstrap import Credit, Interval, accuracy_intervals, difference_intervals
from workflow_scripts.scoring.pair_accuracy import TieRule
from workflow_scripts.scoring.protocols import Average, Protocol, macro, micro

PAPER_TABLE1 = {("imagereward", 1): 64.7, ("imagereward", 3): 64.9, ("hpsv2", 1): 65.1, ("hpsv2", 3): 65.4}
PAPER_TABLE2 = {"single human": 65.1, ("zeroshot", "hard"): 51.0, ("zeroshot", "soft"): 55.4}
PAPER_TABLE2 |= {("grpo", "hard"): 59.2, ("grpo", "soft"): 64.9}
ROWS_OF_TABLE2 = {
    ("zeroshot", "hard"): "Zero-shot reasoning",
    ("zeroshot", "soft"): "Zero-shot reasoning + soft reward",
    ("grpo", "hard"): "Trained on ImageReward",
    ("grpo", "soft"): "Trained on ImageReward + soft reward",
}
PROTOCOLS = {
    "imagereward": "ImageReward: micro over strict pairs, predicted tie wrong",
    "hpsv2": "HPDv2: macro over prompts, tie not an inversion",
    "own": "As ImageReward: micro over strict pairs, predicted tie wrong",
}

Key = tuple[str, str, str]  # track, policy and test set


class Case(NamedTuple):
    """One accuracy of the tables."""

    policy: Key
    seeds: list[int]
    """Of training, averaged."""
    method: str
    k: int
    against: str
    protocol: Protocol


class Measured:
    """Accuracies of all policies: the credit of every prompt under every rule."""

    def __init__(
        self, paths: Iterable[Path], config: MakeTables, model: str, trainings: dict[tuple[str, int], dict[str, Any]]
    ) -> None:
        """Read the accuracy files and the per-prompt files beside them.

        Args:
            paths: accuracy files of every policy, test set and seed.
            config: of the tables.
            model: name of the base policy.
            trainings: training records by track and seed.
        """
        self.config, self.model, self.trainings = config, model, trainings
        self.records: dict[tuple[Key, int], dict[str, Any]] = {}
        self.credits: dict[tuple[Key, int], dict[Rule, Credit]] = {}
        for path in paths:
            record = json.loads(path.read_text(encoding="utf-8"))
            key = (record["track"], record["policy"], record["test"]), record["seed"]
            self.records[key] = record
            table = pq.read_table(path.with_name(f"{path.stem}-prompts.parquet"))
            prompts = record["prompts"]  # the number of rows for each rule, always in the order of the test set
            rules = table.select(Rule._fields).take(np.arange(0, len(table), prompts)).to_pylist()
            correct, pairs = (table[name].to_numpy().reshape(-1, prompts) for name in ("correct", "pairs"))
            self.credits[key] = {Rule(**rule): (c, p) for rule, c, p in zip(rules, correct, pairs, strict=True)}

    def protocol(self, test: str, against: str) -> Protocol:
        """The test set's own protocol; a noise-free tie is no judgement, so it is left out."""
        official = Protocol(**next(record["official"] for (key, _), record in self.records.items() if key[2] == test))
        return official if against == LABELS else official._replace(label_tie="dropped")

    def targets(self, policy: Key) -> list[str]:
        """What a policy is measured against: the labels, and in the synthetic world the noise-free order."""
        present = {rule.against for rule in self.credits[policy, self.config.seeds[0]]}
        return [target for target in (LABELS, NOISE_FREE) if target in present]

    def seed_groups(self) -> dict[str, list[int]]:
        """Every seed by itself, and all of them pooled."""
        seeds = self.config.seeds
        return {**{str(seed): [seed] for seed in seeds}, **({"pooled": seeds} if len(seeds) > 1 else {})}

    def credit(self, case: Case) -> Credit:
        """(correct, pairs) of each prompt, averaged over seeds."""
        missing = self.config.missing_answer if case.method in METHODS else "wrong"
        rule = Rule(case.method, case.k, case.against, case.protocol.tie, case.protocol.label_tie, missing)
        by_seed = [self.credits[case.policy, seed][rule] for seed in case.seeds]
        correct, pairs = (sum(parts[1:], start=parts[0]) / len(case.seeds) for parts in zip(*by_seed, strict=True))
        return correct, pairs

    def estimate(self, case: Case) -> float:
        """Accuracy without its interval."""
        correct, pairs = self.credit(case)
        accuracy = micro if case.protocol.average == "micro" else macro
        return float(accuracy(correct[pairs > 0], pairs[pairs > 0]))

    def accuracies(self, cases: Sequence[Case], average: Average) -> list[Interval]:
        """Accuracies with their intervals."""
        b = self.config.bootstrap
        credits = [self.credit(case) for case in cases]
        return accuracy_intervals(credits, average, b.confidence, b.resamples, b.seed)

    def differences(self, cases: Sequence[tuple[Case, Case]], average: Average) -> list[Interval]:
        """Accuracies of the second minus the first of each, paired over prompts."""
        b = self.config.bootstrap
        credits = [(self.credit(first), self.credit(second)) for first, second in cases]
        return difference_intervals(credits, average, b.confidence, b.resamples, b.seed)

    def ceiling(self, policy: Key, seeds: list[int], against: str) -> float | None:
        """Accuracy of the noise-free order, the best possible given label noise; known in the synthetic world only."""
        if NOISE_FREE not in self.targets(policy):
            return None
        if against == NOISE_FREE:
            return 100.0
        protocol = self.protocol(policy[2], against)._replace(tie="half")
        return percent(self.estimate(Case(policy, seeds[:1], NOISE_FREE, 1, against, protocol)))

    def context(self, policy: Key, seeds: list[int], against: str) -> dict[str, Any]:
        """Last columns of every row: what its accuracies can be compared with, and what they were measured on."""
        track, name, test = policy
        records = [self.records[policy, seed] for seed in seeds]
        first = Case(policy, seeds[:1], "soft", self.config.report_k[0], against, self.protocol(test, against))
        notes = [text for seed in seeds for text in self.trainings[track, seed]["warnings"]] if name == "grpo" else []
        return {
            "ceiling": self.ceiling(policy, seeds, against),
            "n_pairs": int(self.credit(first)[1].sum()),
            "n_prompts": records[0]["prompts"],
            "protocol": PROTOCOLS[test],
            "model": self.model,
            "data_source": records[0]["data_source"],
            "rollouts": records[0]["rollouts"],
            "forced_percent": percent(float(np.mean([r["forced_share"] for r in records]))),
            "missing_answer_percent": percent(float(np.mean([r["missing_answer_share"] for r in records]))),
            "notes": "; ".join(notes),
        }

    def trained_on(self, policy: Key, seeds: list[int]) -> dict[str, float | None]:
        """Columns that say how much a policy was trained on, means over its seeds; empty for a zero-shot policy."""
        track, name, _ = policy
        if name != "grpo":
            return dict.fromkeys(TRAINED_ON)
        records = [self.trainings[track, seed] for seed in seeds]
        means = {name: float(np.mean([record[name] for record in records])) for name in TRAINED_ON}
        return {name: round(mean, 3) if name == "epochs" else round(mean) for name, mean in means.items()}


def percent(value: float | None, digits: int = 2) -> float | None:
    """A share as a rounded percentage."""
    return None if value is None or np.isnan(value) else round(100 * value, digits)


def columns(interval: Interval, name: str) -> dict[str, float | None]:
    """A mean with its standard error and interval, in percent."""
    return {
        name: percent(interval.estimate),
        f"{name}_se": percent(interval.standard_error),
        f"{name}_low": percent(interval.low),
        f"{name}_high": percent(interval.high),
    }


def table1(measured: Measured) -> pd.DataFrame:
    """Data set x Mean@k with soft reward, own test set first, then cross rows: of trained policies where there are any.

    A zero-shot policy has no training data; `training_data` then names the track whose questions it answers.
    """
    config = measured.config
    shown = config.policies[-1]
    titles = track_titles(config.own_title)
    if shown == "grpo":
        titles |= {"hpsv2": f"HPSv2 ({config.hpsv2_fraction:.0%} subset)"}
    else:
        titles = {track: f"none (asked as for {title})" for track, title in titles.items()}
    first, last = config.report_k[0], config.report_k[-1]
    rows = []
    for track, test in [(t, t) for t in config.tracks] + [(c.track, c.test) for c in config.cross_tests]:
        policy = (track, shown, test)
        for against in measured.targets(policy):
            protocol = measured.protocol(test, against)
            groups = measured.seed_groups()
            cases = {
                (name, k): Case(policy, seeds, "soft", k, against, protocol)
                for name, seeds in groups.items()
                for k in config.report_k
            }
            values = dict(zip(cases, measured.accuracies(list(cases.values()), protocol.average), strict=True))
            gained = [(cases[name, first], cases[name, last]) for name in groups] if last > first else []
            gains = dict(zip(groups, measured.differences(gained, protocol.average), strict=False))
            for name, seeds in groups.items():
                heads = (titles[track], dataset_titles(config.own_title)[test], against)
                row: dict[str, Any] = dict(zip(HEADS["table1"], heads, strict=True)) | {"seed": name}
                for k in config.report_k:
                    row |= columns(values[name, k], f"mean@{k}")
                    own_labels = track == test and against == LABELS and shown == "grpo"
                    row[f"mean@{k}_paper"] = PAPER_TABLE1.get((track, k)) if own_labels else None
                if last > first:
                    row |= columns(gains[name], "gain")
                rows.append(row | measured.trained_on(policy, seeds) | measured.context(policy, seeds, against))
    return pd.DataFrame(rows)


def table2(measured: Measured) -> pd.DataFrame:
    """Sampled answer against soft reward, zero-shot and trained, on the ImageReward test set."""
    config = measured.config
    if "imagereward" not in config.tracks:
        return pd.DataFrame({"method": []})
    rows = []
    shown: Key = ("imagereward", config.policies[-1], "imagereward")
    for against in measured.targets(shown):
        protocol = measured.protocol("imagereward", against)
        if against == LABELS:
            record = measured.records[shown, config.seeds[0]]
            human = {
                "method": "Single human",
                "against": against,
                f"mean@{config.report_k[0]}": percent(record["second_annotator_agreement"]),
                "paper": PAPER_TABLE2["single human"],
                "data_source": record["data_source"],
                "notes": "" if record["second_annotator_agreement"] else "not measurable: the data has one annotator",
            }
            rows.append(human)
        for (name, method), title in ROWS_OF_TABLE2.items():
            if name not in config.policies:
                continue
            policy = ("imagereward", name, "imagereward")
            groups = measured.seed_groups()
            cases = [
                Case(policy, seeds, method, k, against, protocol) for seeds in groups.values() for k in config.report_k
            ]
            values = iter(measured.accuracies(cases, protocol.average))
            for group, seeds in groups.items():
                row: dict[str, Any] = {"method": title, "against": against, "seed": group}
                for k in config.report_k:
                    row |= columns(next(values), f"mean@{k}")
                row["paper"] = PAPER_TABLE2[name, method] if against == LABELS else None
                rows.append(row | measured.context(policy, seeds, against))
    counts = dict.fromkeys(("n_pairs", "n_prompts", "rollouts"), "Int64")  # the human row has none of them
    return pd.DataFrame(rows, columns=list(rows[-1])).astype(counts)


End = tuple[str, str, int]  # policy, method, k


def claims(ks: list[int], policies: Sequence[str]) -> list[tuple[str, End | None, End]]:
    """What the paper claims of these policies: (words, worse end or None for chance, better end)."""
    first, last = ks[0], ks[-1]
    named = {p: POLICIES[p] for p in policies}
    found: list[tuple[str, End | None, End]] = []
    for p, policy in named.items():
        found.append((f"{policy} > chance, soft reward, Mean@{first}", None, (p, "soft", first)))
        for k in ks:
            found.append((f"soft reward > sampled answer, {policy}, Mean@{k}", (p, "hard", k), (p, "soft", k)))
    for m in ("hard", "soft"):
        for k in ks if len(named) > 1 else ():
            found.append((f"trained > zero-shot, {METHODS[m]}, Mean@{k}", ("zeroshot", m, k), ("grpo", m, k)))
        for p, policy in named.items() if last > first else ():
            found.append((f"Mean@{last} > Mean@{first}, {policy}, {METHODS[m]}", (p, m, first), (p, m, last)))
    return found


def claim_cases(measured: Measured, track: str, against: str) -> list[tuple[dict[str, Any], Case | None, Case]]:
    """(first columns, worse case or None for chance, better case) of every claim about a track, by tie rule and seed.

    Each claim stands under the official tie rule, under "wrong" and under "half", so that no tie rule passes for an
    effect.
    """
    official = measured.protocol(track, against)
    ties: tuple[TieRule, ...] = (official.tie, "wrong", "half")
    found = []
    for claim, worse, better in claims(measured.config.report_k, measured.config.policies):
        for tie in dict.fromkeys(ties):
            # Another tie rule than the official one judges strict pairs only.
            protocol = official if tie == official.tie else Protocol(tie, official.average, "dropped")
            for group, seeds in measured.seed_groups().items():
                head = {"claim": claim, "test_data": track, "against": against, "tie": tie}
                head |= {"average": official.average, "seed": group}
                found.append(
                    (
                        head,
                        worse and Case((track, worse[0], track), seeds, *worse[1:], against, protocol),
                        Case((track, better[0], track), seeds, *better[1:], against, protocol),
                    )
                )
    return found


def comparisons(measured: Measured) -> pd.DataFrame:
    """Every claim with its difference in percentage points, paired bootstrap over prompts."""
    rows = []
    for track in measured.config.tracks:
        for against in measured.targets((track, measured.config.policies[-1], track)):
            average = measured.protocol(track, against).average
            cases = claim_cases(measured, track, against)
            alone = iter(measured.accuracies([high for _, low, high in cases if low is None], average))
            paired = iter(measured.differences([(low, high) for _, low, high in cases if low], average))
            for head, low, high in cases:
                if low is None:
                    reached = next(alone)
                    ends = (reached.low - 0.5, reached.high - 0.5)
                    interval = Interval(reached.estimate - 0.5, reached.standard_error, *ends)
                else:
                    interval = next(paired)
                estimate = measured.estimate(high)
                reached_from = {"from": percent(estimate - interval.estimate), "to": percent(estimate)}
                rows.append(head | reached_from | columns(interval, "difference") | {"holds": bool(interval.low > 0)})
    return pd.DataFrame(rows)


def sensitivity(measured: Measured) -> pd.DataFrame:
    """Every accuracy under every tie rule, micro and macro, and missing-answer rule."""
    rows = []
    for ((track, policy, test), seed), record in sorted(measured.records.items()):
        for cell in record["cells"]:
            interval = Interval(*(cell[name] for name in Interval._fields))
            rule = {name: cell[name] for name in (*Rule._fields, "average")}
            head = {"training_data": track, "policy": policy, "test_data": test, "seed": seed}
            rows.append({**head, **rule, **columns(interval, "accuracy"), "n_pairs": round(cell["pairs"], 2)})
    return pd.DataFrame(rows)


def markdown(one: pd.DataFrame, two: pd.DataFrame, compared: pd.DataFrame, config: MakeTables) -> str:
    """Both tables and the comparisons for people: accuracy in percent with its interval."""

    def shown(frame: pd.DataFrame, keys: list[str], values: list[str]) -> str:
        text = frame[[key for key in keys if key in frame]].copy()
        for name in values:
            text[name] = [with_interval(row, name) for row in frame.to_dict("records")]
        return str(text.fillna("").to_markdown(index=False))

    means = [f"mean@{k}" for k in config.report_k]
    papers = [f"{mean}_paper" for mean in means]
    titles = table_titles("grpo" in config.policies)
    say = f"Accuracy in %, {config.bootstrap.confidence:.0%} bootstrap interval over prompts."
    sources = ", ".join(sorted(set(one["data_source"])))
    parts = [
        f"# Tables\n\n{say} Data source: {sources}. Protocols and settings of every row are in the CSV files.",
        f"## {titles['table1']}",
        shown(one, [*HEADS["table1"], "seed", *TRAINED_ON, *papers, "ceiling", "notes"], means),
    ]
    if len(two):
        keys = [*HEADS["table2"], "seed", "paper", "ceiling", "notes"]
        parts += [f"## {titles['table2']}", shown(two, keys, means)]
    # A tie at half a point favours neither side; the other rules are in comparisons.csv.
    keys = ["claim", "test_data", "against", "seed", "holds"]
    parts += [
        "## Comparisons: difference in percentage points, paired over prompts, a tie counting half",
        shown(compared[compared["tie"] == "half"], keys, ["difference"]),
    ]
    return "\n\n".join(parts) + "\n"
