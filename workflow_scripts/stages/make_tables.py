"""Make the paper's tables from measured accuracies: table1, table2, the comparisons behind them, and sensitivity.

python -m workflow_scripts.stages.make_tables results/accuracy/*/*/seed*/*.json \
    --base results/policies/base/manifest.json \
    --adapters results/policies/imagereward/seed0/adapter_model.safetensors --table1 results/table1.csv \
    --table2 results/table2.csv --comparisons results/comparisons.csv --sensitivity results/sensitivity.csv \
    --markdown results/tables.md --config '{"tracks": ["imagereward"], "seeds": [0], …}'
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from pydantic_settings import CliPositionalArg

from workflow_scripts.configuration.stages import MakeTables
from workflow_scripts.files.writing import replacing
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.scoring.bootstrap import Credit, Interval, accuracy_intervals, difference_intervals
from workflow_scripts.scoring.protocols import macro, micro
from workflow_scripts.tracking.stage_run import run_stage

PAPER_TABLE1 = {("imagereward", 1): 64.7, ("imagereward", 3): 64.9, ("hpsv2", 1): 65.1, ("hpsv2", 3): 65.4}
PAPER_TABLE2 = {"single human": 65.1, ("zeroshot", "hard"): 51.0, ("zeroshot", "soft"): 55.4}
PAPER_TABLE2 |= {("grpo", "hard"): 59.2, ("grpo", "soft"): 64.9}
METHODS = {
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
TARGETS = ("labels", "noise-free order")
RULES = ["method", "k", "against", "tie", "label_tie", "missing"]


class Arguments(StageArguments):
    """Make the paper's tables from measured accuracies."""

    accuracies: CliPositionalArg[list[Input]]
    """Accuracy files of every policy, test set and seed; their per-prompt files stand beside them."""
    base: Input
    """Manifest of the base policy."""
    adapters: list[Input]
    """Adapters of the trained policies, for the warnings of their training."""
    table1: Output
    """Paper's Table 1."""
    table2: Output
    """Paper's Table 2."""
    comparisons: Output
    """Every claimed improvement with its paired interval."""
    sensitivity: Output
    """The same accuracies under every rule."""
    markdown: Output
    """The tables for people."""
    config: MakeTables
    """Configuration of this stage as JSON."""


class Measured:
    """Accuracies of all policies: credit of every prompt under every rule, averaged where several seeds are asked."""

    def __init__(self, paths: list[Path], config: MakeTables) -> None:
        """Read the accuracy files and the per-prompt files beside them."""
        self.config = config
        self.records: dict[tuple[str, str, str, int], dict[str, Any]] = {}
        self.credits: dict[tuple[str, str, str, int], dict[tuple[Any, ...], list[np.ndarray]]] = {}
        for path in paths:
            record = json.loads(path.read_text(encoding="utf-8"))
            key = (record["track"], record["policy"], record["test"], record["seed"])
            self.records[key] = record
            table = pq.read_table(path.with_name(f"{path.stem}-prompts.parquet"))
            prompts = record["prompts"]  # so many rows for each rule, always in the order of the test set
            rules = table.select(RULES).take(np.arange(0, len(table), prompts)).to_pylist()
            columns = [table[name].to_numpy().reshape(-1, prompts) for name in ("correct", "pairs")]
            self.credits[key] = {tuple(rule.values()): credit for rule, *credit in zip(rules, *columns, strict=True)}

    def record(self, track: str, policy: str, test: str, seed: int) -> dict[str, Any]:
        """Accuracy record of one policy on one test set."""
        return self.records[track, policy, test, seed]

    def official(self, test: str, against: str) -> dict[str, str]:
        """The test set's own rules; a noise-free tie is no judgement, so it is left out."""
        rule = next(r["official"] for key, r in self.records.items() if key[2] == test)
        return {**rule, "label_tie": rule["label_tie"] if against == "labels" else "dropped"}

    def credit(
        self, policy: tuple[str, str, str], seeds: list[int], method: str, k: int, against: str, rule: dict[str, str]
    ) -> Credit:
        """(correct, pairs) of each prompt, averaged over seeds."""
        missing = self.config.missing_answer if method in ("soft", "hard") else "wrong"
        row = (method, k, against, rule["tie"], rule["label_tie"], missing)
        by_seed = [self.credits[(*policy, seed)][row] for seed in seeds]
        correct, pairs = (sum(parts[1:], start=parts[0]) / len(seeds) for parts in zip(*by_seed, strict=True))
        return correct, pairs

    def estimate(self, *args: Any) -> float:
        """Accuracy without its interval; arguments of `credit`, the last of which says how prompts are averaged."""
        correct, pairs = self.credit(*args)
        accuracy = micro if args[-1]["average"] == "micro" else macro
        return float(accuracy(correct[pairs > 0], pairs[pairs > 0]))

    def accuracies(self, ends: list[tuple[Any, ...]], average: str) -> list[Interval]:
        """Accuracies with their intervals; each by arguments of `credit`."""
        b = self.config.bootstrap
        credits = [self.credit(*end) for end in ends]
        return accuracy_intervals(credits, average, b.confidence, b.resamples, b.seed)  # type: ignore[arg-type]

    def differences(self, ends: list[tuple[tuple[Any, ...], tuple[Any, ...]]], average: str) -> list[Interval]:
        """Accuracies of the second minus the first of each, paired over prompts."""
        b = self.config.bootstrap
        credits = [(self.credit(*first), self.credit(*second)) for first, second in ends]
        return difference_intervals(credits, average, b.confidence, b.resamples, b.seed)  # type: ignore[arg-type]


def percent(value: float | None, digits: int = 2) -> float | None:
    """A share as a rounded percentage."""
    return None if value is None or np.isnan(value) else round(100 * value, digits)


def seed_groups(seeds: list[int]) -> dict[str, list[int]]:
    """Every seed by itself, and all of them pooled."""
    return {**{str(seed): [seed] for seed in seeds}, **({"pooled": seeds} if len(seeds) > 1 else {})}


def columns(interval: Interval, name: str) -> dict[str, float | None]:
    """A mean with its standard error and interval, in percent."""
    return {
        name: percent(interval.estimate),
        f"{name}_se": percent(interval.standard_error),
        f"{name}_low": percent(interval.low),
        f"{name}_high": percent(interval.high),
    }


def context(measured: Measured, policy: tuple[str, str, str], seeds: list[int], model: str) -> dict[str, Any]:
    """What every row must say of where it comes from."""
    track, name, test = policy
    records = [measured.record(track, name, test, seed) for seed in seeds]
    return {
        "n_prompts": records[0]["prompts"],
        "protocol": PROTOCOLS[test],
        "model": model,
        "data_source": records[0]["data_source"],
        "rollouts": records[0]["rollouts"],
        "forced_percent": percent(float(np.mean([r["forced_share"] for r in records]))),
        "missing_answer_percent": percent(float(np.mean([r["missing_answer_share"] for r in records]))),
    }


def ceiling(measured: Measured, policy: tuple[str, str, str], seeds: list[int], against: str) -> float | None:
    """Accuracy of the noise-free order: what annotator noise leaves to be won (synthetic world only)."""
    if "noise-free order" not in targets_of(measured, policy, seeds[0]):
        return None
    if against == "noise-free order":
        return 100.0
    rule = {**measured.official(policy[2], against), "tie": "half"}
    return percent(measured.estimate(policy, seeds[:1], "noise-free order", 1, against, rule))


def targets_of(measured: Measured, policy: tuple[str, str, str], seed: int) -> list[str]:
    """What can be measured against: the labels, and in the synthetic world the noise-free order."""
    present = {against for _, _, against, *_ in measured.credits[(*policy, seed)]}
    return [target for target in TARGETS if target in present]


def table1(measured: Measured, config: MakeTables, model: str, notes: dict[tuple[str, int], str]) -> pd.DataFrame:
    """Data set x Mean@k with soft reward, own test set first, then cross rows."""
    own = config.own_title
    titles = {"imagereward": "ImageReward", "hpsv2": f"HPSv2 ({config.hpsv2_fraction:.0%} subset)", "own": own}
    tests = {"imagereward": "ImageReward", "hpsv2": "HPDv2", "own": own}
    first, last = config.report_k[0], config.report_k[-1]
    rows = []
    for track, test in [(t, t) for t in config.tracks] + [(c.track, c.test) for c in config.cross_tests]:
        policy = (track, "grpo", test)
        for against in targets_of(measured, policy, config.seeds[0]):
            rule = measured.official(test, against)
            groups = seed_groups(config.seeds)
            ends: dict[tuple[str, int], tuple[Any, ...]] = {
                (name, k): (policy, seeds, "soft", k, against, rule)
                for name, seeds in groups.items()
                for k in config.report_k
            }
            values = dict(zip(ends, measured.accuracies(list(ends.values()), rule["average"]), strict=True))
            gained = [(ends[name, first], ends[name, last]) for name in groups] if last > first else []
            gains = dict(zip(groups, measured.differences(gained, rule["average"]), strict=False))
            for name, seeds in groups.items():
                row: dict[str, Any] = {
                    "training_data": titles[track],
                    "test_data": tests[test],
                    "against": against,
                    "seed": name,
                }
                for k in config.report_k:
                    row |= columns(values[name, k], f"mean@{k}")
                    row[f"mean@{k}_paper"] = (
                        PAPER_TABLE1.get((track, k)) if track == test and against == "labels" else None
                    )
                if last > first:
                    row |= columns(gains[name], "gain")
                row["ceiling"] = ceiling(measured, policy, seeds, against)
                row["n_pairs"] = int(measured.credit(policy, seeds[:1], "soft", first, against, rule)[1].sum())
                row |= context(measured, policy, seeds, model)
                row["notes"] = "; ".join(filter(None, (notes.get((track, seed)) for seed in seeds)))
                rows.append(row)
    return pd.DataFrame(rows)


def table2(measured: Measured, config: MakeTables, model: str, notes: dict[tuple[str, int], str]) -> pd.DataFrame:
    """Sampled answer against soft reward, zero-shot and trained, on the ImageReward test set."""
    if "imagereward" not in config.tracks:
        return pd.DataFrame({"method": []})
    rows = []
    for against in targets_of(measured, ("imagereward", "grpo", "imagereward"), config.seeds[0]):
        rule = measured.official("imagereward", against)
        if against == "labels":
            record = measured.record("imagereward", "grpo", "imagereward", config.seeds[0])
            human = {
                "method": "Single human",
                "against": against,
                f"mean@{config.report_k[0]}": percent(record["second_annotator_agreement"]),
                "paper": PAPER_TABLE2["single human"],
                "data_source": record["data_source"],
                "notes": "" if record["second_annotator_agreement"] else "not measurable: the data has one annotator",
            }
            rows.append(human)
        for (name, method), title in METHODS.items():
            policy = ("imagereward", name, "imagereward")
            groups = seed_groups(config.seeds)
            ends = [(policy, seeds, method, k, against, rule) for seeds in groups.values() for k in config.report_k]
            values = iter(measured.accuracies(ends, rule["average"]))
            for group, seeds in groups.items():
                row: dict[str, Any] = {"method": title, "against": against, "seed": group}
                for k in config.report_k:
                    row |= columns(next(values), f"mean@{k}")
                row["paper"] = PAPER_TABLE2[name, method] if against == "labels" else None
                row["ceiling"] = ceiling(measured, policy, seeds, against)
                row["n_pairs"] = int(
                    measured.credit(policy, seeds[:1], "soft", config.report_k[0], against, rule)[1].sum()
                )
                row |= context(measured, policy, seeds, model)
                trained = [notes.get(("imagereward", seed)) for seed in seeds] if name == "grpo" else []
                row["notes"] = "; ".join(filter(None, trained))
                rows.append(row)
    counts = dict.fromkeys(("n_pairs", "n_prompts", "rollouts"), "Int64")  # the human row has none of them
    return pd.DataFrame(rows, columns=list(rows[-1])).astype(counts)


End = tuple[str, str, int]  # policy, method, k


def claims(ks: list[int]) -> list[tuple[str, End | None, End]]:
    """What the paper claims: (words, worse end or None for chance, better end)."""
    names = {"zeroshot": "zero-shot", "grpo": "trained", "hard": "sampled answer", "soft": "soft reward"}
    first, last = ks[0], ks[-1]
    found: list[tuple[str, End | None, End]] = []
    for p in ("zeroshot", "grpo"):
        found.append((f"{names[p]} > chance, soft reward, Mean@{first}", None, (p, "soft", first)))
        for k in ks:
            found.append((f"soft reward > sampled answer, {names[p]}, Mean@{k}", (p, "hard", k), (p, "soft", k)))
    for m in ("hard", "soft"):
        for k in ks:
            found.append((f"trained > zero-shot, {names[m]}, Mean@{k}", ("zeroshot", m, k), ("grpo", m, k)))
        for p in ("zeroshot", "grpo") if last > first else ():
            found.append((f"Mean@{last} > Mean@{first}, {names[p]}, {names[m]}", (p, m, first), (p, m, last)))
    return found


def comparisons(measured: Measured, config: MakeTables) -> pd.DataFrame:
    """Every claim with its difference in percentage points, paired bootstrap over prompts.

    Each stands under the official tie rule, under "wrong" and under "half", so that no tie rule passes for an effect.
    """
    rows = []
    for track in config.tracks:
        for against in targets_of(measured, (track, "grpo", track), config.seeds[0]):
            official = measured.official(track, against)
            heads: list[dict[str, Any]] = []
            ends: list[tuple[tuple[Any, ...] | None, tuple[Any, ...]]] = []
            for claim, worse, better in claims(config.report_k):
                for tie in dict.fromkeys((official["tie"], "wrong", "half")):
                    # Another tie rule than the official one judges strict pairs only.
                    label_tie = official["label_tie"] if tie == official["tie"] else "dropped"
                    rule = {**official, "tie": tie, "label_tie": label_tie}
                    for group, seeds in seed_groups(config.seeds).items():
                        low, high = (
                            end and ((track, end[0], track), seeds, *end[1:], against, rule) for end in (worse, better)
                        )
                        ends.append((low, high))  # type: ignore[arg-type]
                        head = {"claim": claim, "test_data": track, "against": against, "tie": tie}
                        heads.append({**head, "average": official["average"], "seed": group})
            alone = iter(measured.accuracies([high for low, high in ends if low is None], official["average"]))
            paired = [(low, high) for low, high in ends if low is not None]
            differences = iter(measured.differences(paired, official["average"]))
            for head, (low, high) in zip(heads, ends, strict=True):
                if low is None:
                    reached = next(alone)
                    interval = Interval(
                        reached.estimate - 0.5, reached.standard_error, reached.low - 0.5, reached.high - 0.5
                    )
                else:
                    interval = next(differences)
                estimate = measured.estimate(*high)
                rows.append(
                    {
                        **head,
                        "from": percent(estimate - interval.estimate),
                        "to": percent(estimate),
                        **columns(interval, "difference"),
                        "holds": bool(interval.low > 0),
                    }
                )
    return pd.DataFrame(rows)


def sensitivity(measured: Measured) -> pd.DataFrame:
    """Every accuracy under every tie rule, micro and macro, and missing-answer rule."""
    rows = []
    for (track, policy, test, seed), record in sorted(measured.records.items()):
        for cell in record["cells"]:
            interval = Interval(*(cell[name] for name in Interval._fields))
            rule = {k: cell[k] for k in ("method", "k", "against", "tie", "label_tie", "missing", "average")}
            head = {"training_data": track, "policy": policy, "test_data": test, "seed": seed}
            rows.append({**head, **rule, **columns(interval, "accuracy"), "n_pairs": round(cell["pairs"], 2)})
    return pd.DataFrame(rows)


def markdown(one: pd.DataFrame, two: pd.DataFrame, compared: pd.DataFrame, config: MakeTables) -> str:
    """Both tables and the comparisons for people: accuracy in percent with its interval."""

    def cell(row: Any, name: str) -> str:
        if pd.isna(row.get(name)):
            return ""
        if pd.isna(row.get(f"{name}_low")):
            return f"{row[name]:.1f}"
        return f"{row[name]:.1f} [{row[f'{name}_low']:.1f}, {row[f'{name}_high']:.1f}]"

    def shown(frame: pd.DataFrame, keys: list[str], cells: list[str]) -> str:
        text = frame[[key for key in keys if key in frame]].copy()
        for name in cells:
            text[name] = [cell(row, name) for row in frame.to_dict("records")]
        return str(text.fillna("").to_markdown(index=False))

    means = [f"mean@{k}" for k in config.report_k]
    papers = [f"{mean}_paper" for mean in means]
    say = f"Accuracy in %, {config.bootstrap.confidence:.0%} bootstrap interval over prompts."
    sources = ", ".join(sorted(set(one["data_source"])))
    parts = [
        f"# Tables\n\n{say} Data source: {sources}. Protocols and settings of every row are in the CSV files.",
        "## Table 1: trained policies with soft reward",
        shown(one, ["training_data", "test_data", "against", "seed", *papers, "ceiling", "notes"], means),
    ]
    if len(two):
        keys = ["method", "against", "seed", "paper", "ceiling", "notes"]
        parts += ["## Table 2: ImageReward test set", shown(two, keys, means)]
    # A tie at half a point favours neither side; the other rules are in comparisons.csv.
    chosen = compared[compared["tie"] == "half"]
    keys = ["claim", "test_data", "against", "seed", "holds"]
    parts += [
        "## Comparisons: difference in percentage points, paired over prompts, a tie counting half",
        shown(chosen, keys, ["difference"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config = arguments.config
    with run_stage(arguments) as run:
        manifest = json.loads(arguments.base.read_text(encoding="utf-8"))
        model = manifest["repository"] or Path(manifest["path"]).name
        notes = {}
        for path in arguments.adapters:
            sidecar = run.inputs[str(path)]
            notes[sidecar["config"]["track"], sidecar["config"]["seed"]] = "; ".join(sidecar["warnings"])
        measured = Measured(arguments.accuracies, config)
        one, two = table1(measured, config, model, notes), table2(measured, config, model, notes)
        compared = comparisons(measured, config)
        outputs = {
            arguments.table1: one,
            arguments.table2: two,
            arguments.comparisons: compared,
            arguments.sensitivity: sensitivity(measured),
        }
        for path, frame in outputs.items():
            with replacing(path) as temporary:
                frame.to_csv(temporary, index=False, lineterminator="\n")
        with replacing(arguments.markdown) as temporary:
            temporary.write_text(markdown(one, two, compared, config), encoding="utf-8")
        for row in one.to_dict("records"):
            for k in config.report_k:
                name = (
                    f"table1/{row['training_data']}/{row['test_data']}/{row['against']}/seed {row['seed']}/Mean_at_{k}"
                )
                run.metrics({name: row[f"mean@{k}"]})
        run.metrics({"claims": len(compared), "claims_that_hold": int(compared["holds"].sum())})


if __name__ == "__main__":
    main()
