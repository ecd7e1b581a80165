"""Draw the figures: each as SVG and PNG, with its data as CSV.

python -m workflow_scripts.stages.make_figures results/rollouts/*/*/seed*/*/*.parquet \
    --scores results/scores/imagereward/grpo/seed0/imagereward.parquet \
    --subsets results/datasets/imagereward/test/subset.parquet \
    --adapters results/policies/imagereward/seed0/adapter_model.safetensors \
    --figures results/figures/mean_at_k.csv --figures results/figures/mean_at_k.svg --config '{"tracks": …}'

The CSV is the truth, a drawing is made from it alone. Accuracies here are over strictly ranked pairs of human labels, a
predicted tie counting half, so that sampled answers and soft rewards can be compared on one scale. With several seeds
of training they are means over them.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic_settings import CliPositionalArg

from workflow_scripts.configuration.stages import MakeFigures
from workflow_scripts.files.writing import replacing
from workflow_scripts.policy.prompts import ANSWERS
from workflow_scripts.preferences.schema import SUBSET, read_table
from workflow_scripts.reporting import drawing
from workflow_scripts.reporting.agreement import (
    Resampling,
    curve_ks,
    grouped_mean,
    judged_pairs,
    judged_prompts,
    mean_at_k,
    score_matrices,
)
from workflow_scripts.reporting.calibration import (
    brier_score,
    expected_calibration_error,
    probability_bins,
    probability_higher,
)
from workflow_scripts.rollouts.record import ROLLOUT
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.scoring.anchor_ranking import candidate_probability
from workflow_scripts.scoring.pair_accuracy import expected_answer
from workflow_scripts.scoring.protocols import NEUTRAL, OFFICIAL
from workflow_scripts.tracking.stage_run import run_stage

BINS = 10  # equally wide, of a probability
RATING_EDGES = np.arange(1, 7.25, 0.5)  # bins of an expected rating
TIES = ("wrong", "half", "dropped", "right")

# Each figure and the columns of its table.
FIGURES: dict[str, tuple[Callable[[pd.DataFrame], Figure], list[str]]] = {
    "training_curves": (drawing.training_curves, ["case", "track", "seed", "metric", "step", "value"]),
    "mean_at_k": (
        drawing.mean_at_k,
        ["case", "track", "test", "policy", "method", "k", "tokens", "mean", "low", "high"],
    ),
    "calibration_pairs": (
        drawing.calibration_pairs,
        [
            *("case", "track", "test", "policy", "rollouts", "bin_low", "bin_high", "predicted", "mean", "low", "high"),
            *("count", "brier", "ece"),
        ],
    ),
    "calibration_ratings": (
        drawing.calibration_ratings,
        ["case", "track", "test", "policy", "bin_low", "bin_high", "predicted", "mean", "low", "high", "count", "rmse"],
    ),
    "answers": (drawing.answers, ["case", "track", "source", "when", "answer", "share"]),
    "rank_distance": (
        drawing.rank_distance,
        ["case", "track", "test", "policy", "method", "distance", "mean", "low", "high", "count"],
    ),
    "confidence": (
        drawing.confidence,
        ["case", "track", "test", "policy", "method", "fifth", "mean", "low", "high", "count"],
    ),
    "tie_rules": (
        drawing.tie_rules,
        ["case", "track", "test", "policy", "method", "k", "tie", "mean", "low", "high"],
    ),
    "presentation_order": (
        drawing.presentation_order,
        ["case", "track", "test", "policy", "method", "order", "mean", "low", "high", "count"],
    ),
    "anchor_rank": (
        drawing.anchor_rank,
        ["case", "track", "test", "policy", "method", "anchor_rank", "mean", "low", "high", "count"],
    ),
}


class Arguments(StageArguments):
    """Draw the figures: each as SVG and PNG, with its data as CSV."""

    rollouts: CliPositionalArg[list[Input]]
    """Rollout files of every policy, test set and seed."""
    scores: list[Input]
    """Scores of the same."""
    subsets: list[Input]
    """Prompts of every test set with their annotations."""
    adapters: list[Input]
    """Adapters of the trained policies; their training records stand beside them."""
    figures: list[Output]
    """Files to write: a figure's name with .csv, .svg or .png."""
    config: MakeFigures
    """Configuration of this stage as JSON."""


class Seed(NamedTuple):
    """A policy of one seed on one test set."""

    prompts: list[dict[str, Any]]  # of agreement.judged_prompts
    scores: dict[str, list[np.ndarray]]  # (N, K) of each prompt, by method
    rollouts: pd.DataFrame  # columns of ROLLOUT that are used, `tokens`, `probabilities` of the answers


Policies = dict[tuple[str, str, str], list[Seed]]  # by track, policy and test set


def read_rollouts(paths: list[Path]) -> pd.DataFrame:
    """Rollouts of one policy on one test set, with the answers' probabilities and the number of tokens."""
    table = pd.concat(
        [read_table(path, ROLLOUT).drop_columns(["text", "seed"]).to_pandas() for path in paths], ignore_index=True
    )
    logprobs = np.stack(list(table["answer_logprobs"]))
    weights = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    return table.drop(columns=["answer_logprobs", "completion_ids"]).assign(
        tokens=table["completion_ids"].map(len),
        probabilities=list(weights / weights.sum(axis=1, keepdims=True)),
    )


def read_policies(arguments: Arguments, configs: dict[Path, dict[str, Any]], subsets: dict[str, Any]) -> Policies:
    """Everything recorded of every policy, by track, policy and test set, one entry for each seed."""
    files = defaultdict(list)
    for path in arguments.rollouts:
        files[tuple(configs[path][key] for key in ("track", "policy", "test", "seed"))].append(path)
    found: Policies = defaultdict(list)
    for path in arguments.scores:
        *key, seed = (configs[path][name] for name in ("track", "policy", "test", "seed"))
        scores = pd.read_parquet(path)
        prompts = judged_prompts(subsets[key[2]], scores)
        by_method = {method: score_matrices(scores, prompts, method) for method in drawing.METHODS}
        found[tuple(key)].append(Seed(prompts, by_method, read_rollouts(files[(*key, seed)])))
    return found


class Statistics:
    """The tables of all figures, from what was recorded of the policies."""

    def __init__(self, policies: Policies, config: MakeFigures) -> None:
        """Keep what every table needs."""
        self.policies = policies
        self.config = config
        self.resampling = Resampling(**config.bootstrap.model_dump())
        own = config.own_title or "own data"
        self.titles = {"imagereward": "ImageReward", "hpsv2": "HPSv2", "own": own}
        self.tests = {"imagereward": "ImageReward", "hpsv2": "HPDv2", "own": own}

    def head(self, track: str, policy: str, test: str) -> dict[str, str]:
        """First columns of most tables."""
        case = f"{self.titles[track]} ({self.config.tracks[track]})"
        case += "" if track == test else f" on {self.tests[test]}"
        return {"case": case, "track": track, "test": test, "policy": policy}

    def pairwise(self, track: str) -> bool:
        """Whether a track's policies compare pairs."""
        return self.config.tracks[track] == "pairwise"

    def neutral(self, track: str) -> float:
        """The score of a track's policies that prefers nothing."""
        return NEUTRAL[self.config.tracks[track]]

    def curve(self, key: tuple[str, str, str], method: str, k: int, tie: str) -> dict[str, float]:
        """Accuracy at Mean@k with its interval."""
        interval = mean_at_k(
            [(s.scores[method], [p["ranks"] for p in s.prompts]) for s in self.policies[key]],
            k,
            tie,  # type: ignore[arg-type]
            self.config.missing_answer,
            self.neutral(key[0]),
            OFFICIAL[key[2]].average,
            self.resampling,
        )
        return {"mean": interval.estimate, "low": interval.low, "high": interval.high}

    def rollouts(self, key: tuple[str, str, str]) -> int:
        """Number of recorded rollouts of each item."""
        return min(int(seed.rollouts["k"].max()) + 1 for seed in self.policies[key])

    def mean_at_k(self) -> pd.DataFrame:
        """Accuracy for every number of averaged rollouts, with the tokens that they take."""
        rows = []
        for key, seeds in self.policies.items():
            tokens = float(np.mean([seed.rollouts["tokens"].mean() for seed in seeds]))
            for method in drawing.METHODS:
                for k in curve_ks(self.rollouts(key)):
                    rows.append(
                        {**self.head(*key), "method": method, "k": k, "tokens": k * tokens}
                        | self.curve(key, method, k, "half")
                    )
        return pd.DataFrame(rows)

    def tie_rules(self) -> pd.DataFrame:
        """Accuracy of one rollout under every tie rule."""
        rows = [
            {**self.head(*key), "method": method, "k": 1, "tie": tie} | self.curve(key, method, 1, tie)
            for key in self.policies
            for method in drawing.METHODS
            for tie in TIES
        ]
        return pd.DataFrame(rows)

    def pairs(self, key: tuple[str, str, str], method: str) -> pd.DataFrame:
        """Every pair that people rank strictly, with the verdict of the mean of all rollouts and the anchor's rank."""
        missing, neutral = self.config.missing_answer, self.neutral(key[0])

        def judged(seed: Seed) -> pd.DataFrame:
            pairs = judged_pairs(seed.prompts, seed.scores[method], missing, neutral)
            return pairs.assign(anchor_rank=pairs["prompt_id"].map(anchor_ranks(seed)))

        return pd.concat([judged(seed) for seed in self.policies[key]], ignore_index=True)

    def rank_distance(self) -> pd.DataFrame:
        """Accuracy by difference of the human ranks."""
        return self._by_group("distance", self.policies)

    def confidence(self) -> pd.DataFrame:
        """Accuracy by fifths of the difference of the soft scores; a sampled answer has hardly any differences."""
        return self._by_group("fifth", self.policies, ["soft"])

    def anchor_rank(self) -> pd.DataFrame:
        """Accuracy of pairwise policies by the human rank of the image that the others were compared with."""
        return self._by_group("anchor_rank", [key for key in self.policies if self.pairwise(key[0])])

    def _by_group(
        self, column: str, keys: Iterable[tuple[str, str, str]], methods: Iterable[str] = drawing.METHODS
    ) -> pd.DataFrame:
        tables = []
        for key in keys:
            for method in methods:
                pairs = self.pairs(key, method)
                pairs["fifth"] = np.ceil(pairs["margin"].rank(method="first") / len(pairs) * 5)
                table = grouped_mean(pairs, [column], "correct", self.resampling)
                tables.append(table.assign(**self.head(*key), method=method))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def presentation_order(self) -> pd.DataFrame:
        """Of single rollouts of pairwise policies: accuracy by the candidate's place, preference for the second."""
        tables = []
        for key, seeds in self.policies.items():
            if not self.pairwise(key[0]):
                continue
            compared = pd.concat([comparisons(seed) for seed in seeds], ignore_index=True)
            for method in drawing.METHODS:
                probability = compared[method]
                agreed = np.where(probability == 0.5, 0.5, (probability > 0.5) == (compared["outcome"] == 1))
                place = np.where(compared["second"], "correct, candidate second", "correct, candidate first")
                frame = pd.concat(
                    [
                        compared.assign(order=place, value=np.where(probability.isna(), np.nan, agreed)),
                        compared.assign(
                            order="second preferred, by policy",
                            value=np.where(compared["second"], probability, 1 - probability),
                        ),
                        compared.assign(
                            order="second preferred, by people",
                            value=np.where(compared["second"], compared["outcome"], 1 - compared["outcome"]),
                        ),
                    ]
                )
                table = grouped_mean(frame, ["order"], "value", self.resampling)
                tables.append(table.assign(**self.head(*key), method=method))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def calibration_pairs(self) -> pd.DataFrame:
        """Reliability of the probability that one image is preferred, of single rollouts and of their mean."""
        tables = []
        for key, seeds in self.policies.items():
            rollouts = self.rollouts(key)
            predicted = comparisons if self.pairwise(key[0]) else rated_comparisons
            for number in dict.fromkeys((1, rollouts)):
                frame = pd.concat([predicted(seed, number > 1) for seed in seeds], ignore_index=True)
                if frame.empty:
                    continue
                values = frame.assign(bin=probability_bins(frame["soft"], BINS))
                table = self._reliability(values, "soft", "outcome", np.arange(BINS + 1) / BINS)
                scores = (frame["soft"].to_numpy(), frame["outcome"].to_numpy())
                tables.append(
                    table.assign(
                        **self.head(*key),
                        rollouts=number,
                        brier=brier_score(*scores),
                        ece=expected_calibration_error(*scores, BINS),
                    )
                )
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def calibration_ratings(self) -> pd.DataFrame:
        """Human rating of the images that have about the same expected rating, mean of all rollouts."""
        tables = []
        for key, seeds in self.policies.items():
            rated = [seed for seed in seeds if all(prompt["ratings"] is not None for prompt in seed.prompts)]
            if self.pairwise(key[0]) or not rated:
                continue
            frame = pd.concat([expected_ratings(seed) for seed in rated], ignore_index=True)
            bins = np.clip(np.searchsorted(RATING_EDGES, frame["expected"], side="right") - 1, 0, len(RATING_EDGES) - 2)
            table = self._reliability(frame.assign(bin=bins), "expected", "rating", RATING_EDGES)
            rmse = math.sqrt(float(((frame["expected"] - frame["rating"]) ** 2).mean()))
            tables.append(table.assign(**self.head(*key), rmse=rmse))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def _reliability(self, frame: pd.DataFrame, predicted: str, observed: str, edges: np.ndarray) -> pd.DataFrame:
        table = grouped_mean(frame, ["bin"], observed, self.resampling)
        bins = table["bin"].to_numpy(int)
        return table.assign(
            bin_low=edges[bins],
            bin_high=edges[bins + 1],
            predicted=frame.groupby("bin")[predicted].mean().reindex(bins).to_numpy(),
        )

    def answers(self, records: dict[tuple[str, int], dict[str, Any]]) -> pd.DataFrame:
        """Share of each sampled answer before and after training: in validation, and on the policy's own test set."""
        rows = []
        for track in dict.fromkeys(track for track, _ in records):
            names = [*map(str, ANSWERS[self.config.tracks[track]]), "none"]
            own = [record for (name, _), record in records.items() if name == track]
            for when in ("before", "after"):
                shares: defaultdict[str, list[float]] = defaultdict(list)
                for record in own:
                    step = 0 if when == "before" else record["best_step"]
                    entry = next(h for h in record["history"] if h["step"] == step and "eval_largest_answer_share" in h)
                    for name in names:
                        shares[name].append(entry[f"eval_answer_share/{name.replace('none', 'None')}"])
                rows += [(track, "validation", when, name, float(np.mean(values))) for name, values in shares.items()]
            for when, policy in (("before", "zeroshot"), ("after", "grpo")):
                given = pd.concat([seed.rollouts["sampled_answer"] for seed in self.policies[track, policy, track]])
                counts = given.map(lambda answer: "none" if pd.isna(answer) else str(int(answer))).value_counts(
                    normalize=True
                )
                rows += [(track, "test", when, name, float(counts.get(name, 0.0))) for name in names]
            prompts = self.policies[track, "grpo", track][0].prompts
            if not self.pairwise(track) and all(prompt["ratings"] is not None for prompt in prompts):
                ratings = np.concatenate([prompt["ratings"] for prompt in prompts])
                rows += [(track, "test", "people", name, float(np.mean(ratings == float(name)))) for name in names[:-1]]
        table = pd.DataFrame(rows, columns=["track", "source", "when", "answer", "share"])
        return table.assign(case=[self.head(track, "grpo", track)["case"] for track in table["track"]])

    def training_curves(self, records: dict[tuple[str, int], dict[str, Any]]) -> pd.DataFrame:
        """Every drawn curve of every training, as recorded."""
        rows = [
            {"case": self.head(track, "grpo", track)["case"], "track": track, "seed": seed}
            | {"metric": metric, "step": entry["step"], "value": entry[metric]}
            for (track, seed), record in records.items()
            for entry in record["history"]
            for metric in ("reward", *(f"rewards/{part}/mean" for part in drawing.PARTS), *drawing.CURVES)
            if metric in entry
        ]
        return pd.DataFrame(rows)


def anchor_ranks(seed: Seed) -> dict[str, float]:
    """Human rank of each prompt's anchor; empty where images were judged by themselves."""
    ranks = {p["prompt_id"]: dict(zip(p["image_ids"], p["ranks"], strict=True)) for p in seed.prompts}
    anchors = seed.rollouts.groupby("prompt_id")["anchor"].first().dropna()
    return {str(name): ranks[str(name)][anchor] for name, anchor in anchors.items()}


def comparisons(seed: Seed, mean: bool = False) -> pd.DataFrame:
    """Comparisons of a pairwise policy whose two images people rank strictly.

    Args:
        seed: what is recorded of it.
        mean: of all rollouts of a candidate, both presentation orders among them, and not each rollout by itself.

    Returns:
        `prompt_id`, `second` (the candidate was shown second), `soft` and `hard` (probability that the candidate is
        preferred) and `outcome` (1 where people prefer it).
    """
    ranks = {
        (prompt["prompt_id"], image): rank
        for prompt in seed.prompts
        for image, rank in zip(prompt["image_ids"], prompt["ranks"], strict=True)
    }
    frame = seed.rollouts
    second = frame["candidate_second"].to_numpy(bool)
    soft = expected_answer(np.log(np.maximum(np.stack(list(frame["probabilities"])), 1e-300)), (0, 1))
    difference = np.array(
        [
            ranks[prompt, anchor] - ranks[prompt, candidate]
            for prompt, anchor, candidate in zip(frame["prompt_id"], frame["anchor"], frame["candidate"], strict=True)
        ]
    )
    table = frame[["prompt_id", "candidate"]].assign(
        second=second,
        soft=candidate_probability(soft, second),
        hard=candidate_probability(frame["sampled_answer"].astype(float), second),
        outcome=(difference > 0).astype(float),
    )[difference != 0]
    if mean:
        table = table.groupby(["prompt_id", "candidate"], as_index=False).mean()
    return table


def rated_comparisons(seed: Seed, mean: bool = False) -> pd.DataFrame:
    """The same of a policy that rates: probability that a rating of one image is higher than one of the other.

    Which of two images is the first is decided by their names, as it is for anchors: published order tells who is best.

    Args:
        seed: what is recorded of it.
        mean: of the mean probabilities of all rollouts, and not of each rollout by itself.

    Returns:
        `prompt_id`, `soft` and `outcome`.
    """
    given = {
        name: np.stack(list(rows.sort_values("k")["probabilities"]))
        for name, rows in seed.rollouts.groupby(["prompt_id", "candidate"])
    }
    tables = []
    for prompt in seed.prompts:
        order = np.argsort(prompt["image_ids"])
        images = np.stack([given[prompt["prompt_id"], prompt["image_ids"][i]] for i in order])  # (N, K, A)
        ranks = prompt["ranks"][order]
        first, other = np.triu_indices(len(order), 1)
        strict = ranks[first] != ranks[other]
        first, other = first[strict], other[strict]
        if mean:
            images = images.mean(axis=1, keepdims=True)
        probability = probability_higher(images[first], images[other])  # (P, K)
        outcome = np.repeat((ranks[first] < ranks[other]).astype(float), probability.shape[1])
        tables.append(pd.DataFrame({"prompt_id": prompt["prompt_id"], "soft": probability.ravel(), "outcome": outcome}))
    return pd.concat(tables, ignore_index=True)


def expected_ratings(seed: Seed) -> pd.DataFrame:
    """`expected` rating of each image, mean of its rollouts, and the human `rating`."""
    tables = [
        pd.DataFrame({"prompt_id": p["prompt_id"], "expected": np.nanmean(scores, axis=1), "rating": p["ratings"]})
        for p, scores in zip(seed.prompts, seed.scores["soft"], strict=True)
    ]
    return pd.concat(tables, ignore_index=True)


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    with run_stage(arguments) as run:
        configs = {Path(path): sidecar["config"] for path, sidecar in run.inputs.items()}
        subsets = {configs[path]["dataset"]: read_table(path, SUBSET).to_pylist() for path in arguments.subsets}
        records = {}
        for path in arguments.adapters:
            record = json.loads(path.with_name("training.json").read_text(encoding="utf-8"))
            records[configs[path]["track"], configs[path]["seed"]] = record
        statistics = Statistics(read_policies(arguments, configs, subsets), arguments.config)
        tables = {}
        for name, (_, columns) in FIGURES.items():
            table = getattr(statistics, name)(*([records] if name in ("training_curves", "answers") else []))
            tables[name] = table.reindex(columns=columns)
        for path in arguments.figures:
            table = tables[path.stem]
            with replacing(path) as temporary:
                if path.suffix == ".csv":
                    table.to_csv(temporary, index=False, lineterminator="\n")
                    continue
                draw, _ = FIGURES[path.stem]
                figure = drawing.nothing("no policy of this run compares pairs") if table.empty else draw(table)
                drawing.save(figure, temporary, path.suffix.removeprefix("."))
        pairs = tables["calibration_pairs"]
        for row in pairs.drop_duplicates(["track", "test", "policy", "rollouts"]).to_dict("records"):
            name = f"{row['track']}/{row['policy']}/{row['test']}/{row['rollouts']} rollouts"
            run.metrics({f"brier/{name}": row["brier"], f"calibration_error/{name}": row["ece"]})


if __name__ == "__main__":
    main()
