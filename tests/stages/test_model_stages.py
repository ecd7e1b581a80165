"""Stages from training to tables: on hand-made inputs whose numbers can be checked by hand, or by brute force."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import Mock

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.configuration.model import Configuration, load
from workflow_scripts.configuration.stages import (
    GenerateRollouts,
    MakeTables,
    MeasureAccuracy,
    ScoreRollouts,
    TrainGrpo,
)
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.records import file_record
from workflow_scripts.files.writing import write_json
from workflow_scripts.policy.manifest import PolicyError
from workflow_scripts.policy.prompts import PREFERENCES, RATINGS
from workflow_scripts.preferences.schema import SUBSET, write_preferences
from workflow_scripts.rollouts.decoding import sample_completions
from workflow_scripts.scoring.image_scores import image_scores, rollout_scores
from workflow_scripts.stages import train_grpo
from workflow_scripts.stages.score_rollouts import SCORE
from workflow_scripts.training import generation
from workflow_scripts.training.checkpoints import last_complete_checkpoint
from workflow_scripts.training.validation import Validation

# -------------------------------------------------------------------------------------------------------------- scores


def rollout(answers: tuple[int, ...], rng: random.Random, **columns: Any) -> dict[str, Any]:
    """Columns of a recorded rollout that scoring reads."""
    logits = [rng.gauss(0, 2) for _ in answers]
    total = math.log(sum(map(math.exp, logits)))
    answer = rng.choice([*answers, None])
    probabilities = [logit - total for logit in logits]
    return columns | {"forced": rng.random() < 0.3, "sampled_answer": answer, "answer_logprobs": probabilities}


def pointwise_rollouts(rng: random.Random, ks: int) -> list[dict[str, Any]]:
    """Rollouts about single images of a few prompts."""
    return [
        rollout(
            RATINGS,
            rng,
            item_id=f"p{p}/{i}",
            prompt_id=f"p{p}",
            candidate=f"{p}-{i}",
            anchor=None,
            candidate_second=None,
            k=k,
        )
        for p in range(rng.randint(1, 3))
        for i in range(rng.randint(1, 4))
        for k in range(ks)
    ]


def pairwise_rollouts(rng: random.Random, ks: int, both_orders: bool) -> list[dict[str, Any]]:
    """Rollouts about pairs of an anchor and another image of a few prompts."""
    found = []
    for p in range(rng.randint(1, 3)):
        anchor, *others = rng.sample([f"{p}-{i}" for i in range(5)], rng.randint(2, 5))
        for candidate in others:
            for second in (False, True) if both_orders else (rng.random() < 0.5,):
                shown = [anchor, candidate] if second else [candidate, anchor]
                names = {"item_id": "/".join((f"p{p}", *shown)), "prompt_id": f"p{p}", "candidate": candidate}
                names |= {"anchor": anchor, "candidate_second": second}
                found += [rollout(PREFERENCES, rng, **names, k=k) for k in range(ks)]
    return found


def expected_scores(rollouts: list[dict[str, Any]], answers: tuple[int, ...]) -> dict[Any, tuple[float, float, float]]:
    """(soft, hard, forced) by prompt, image and k, one rollout after the other."""
    found: dict[Any, list[tuple[float, float, float]]] = defaultdict(list)
    anchors = {}
    for row in rollouts:
        soft = sum(a * math.exp(p) for a, p in zip(answers, row["answer_logprobs"], strict=True))
        hard = math.nan if row["sampled_answer"] is None else float(row["sampled_answer"])
        if row["anchor"] and not row["candidate_second"]:
            soft, hard = 1 - soft, 1 - hard
        found[row["prompt_id"], row["candidate"], row["k"]].append((soft, hard, float(row["forced"])))
        if row["anchor"]:
            anchors[row["prompt_id"], row["anchor"], row["k"]] = (0.5, 0.5, math.nan)

    def average(values: tuple[float, ...]) -> float:
        present = [value for value in values if not math.isnan(value)]
        return mean(present) if present else math.nan

    averaged = {key: tuple(average(column) for column in zip(*rows, strict=True)) for key, rows in found.items()}
    return averaged | anchors  # type: ignore[return-value]


def check_scores(rollouts: list[dict[str, Any]], answers: tuple[int, ...], shuffle: random.Random) -> None:
    """Compare `image_scores` with the brute force."""
    expected = expected_scores(rollouts, answers)
    shuffle.shuffle(rollouts)
    frame = image_scores(rollout_scores(pd.DataFrame(rollouts), answers))
    assert set(SCORE.names) <= set(frame.columns)
    assert len(frame) == len(expected)
    for row in frame.to_dict("records"):
        key = row["prompt_id"], row["image_id"], row["k"]
        assert (row["soft"], row["hard"], row["forced"]) == pytest.approx(expected[key], abs=1e-12, nan_ok=True)


@settings(deadline=None, max_examples=25)
@given(rng=st.integers(0, 2**32).map(random.Random), ks=st.integers(1, 3))
def test_pointwise_scores_are_those_of_brute_force(rng: random.Random, ks: int) -> None:
    check_scores(pointwise_rollouts(rng, ks), RATINGS, rng)


@settings(deadline=None, max_examples=25)
@given(rng=st.integers(0, 2**32).map(random.Random), ks=st.integers(1, 3), both=st.booleans())
def test_pairwise_scores_are_those_of_brute_force(rng: random.Random, ks: int, both: bool) -> None:
    check_scores(pairwise_rollouts(rng, ks, both), PREFERENCES, rng)


def test_score_rollouts_joins_all_files(run_main: Any, with_sidecar: Any, tmp_path: Path) -> None:
    from workflow_scripts.rollouts.record import write_rollouts

    rng = random.Random(0)
    rows = [
        row | {"seed": 1, "completion_ids": [1], "text": "", "answer_position": 1}
        for row in pairwise_rollouts(rng, 4, True)
    ]
    files = []
    for block in (0, 1):
        path = tmp_path / f"0000-{block:04d}.parquet"
        write_rollouts(path, [row for row in rows if row["k"] // 2 == block])
        files.append(with_sidecar(path))
    output = tmp_path / "scores.parquet"
    config = ScoreRollouts.of(Configuration(), "hpsv2", "grpo", "hpsv2", 0)
    sidecar = run_main("score_rollouts", config, rollouts=files, scores=output)
    table = pq.read_table(output)
    assert table.schema.equals(SCORE)
    names = list(zip(*(table[name].to_pylist() for name in ("prompt_id", "image_id", "k")), strict=True))
    assert names == sorted(expected_scores(rows, PREFERENCES))
    missing = sum(row["sampled_answer"] is None for row in rows) / len(rows)
    assert sidecar["metrics"]["missing_answer_share"] == pytest.approx(missing)
    assert sidecar["metrics"]["rollouts"] == len(rows)


# ------------------------------------------------------------------------------------------------- accuracy and tables


# Two prompts: three images ranked 1, 2, 3 and three ranked 1, 2, 2, so 3 + 2 strict pairs and one tied.
RANKS = {"p0": [1, 2, 3], "p1": [1, 2, 2]}
UTILITY = {"p0": [0.0, -1.0, -2.0], "p1": [-2.0, -1.0, -1.5]}
# Rating of each image in two rollouts.
SOFT = {"p0": [(5.5, 5.0), (4.5, 5.0), (3.5, 2.0)], "p1": [(4.0, 5.0), (4.5, 2.0), (3.5, 3.0)]}
HARD = {"p0": [(5, 5), (4, 5), (4, None)], "p1": [(4, 5), (4, 2), (3, 3)]}


def measured_inputs(folder: Path, with_sidecar: Callable[..., Path], soft: Any, hard: Any) -> dict[str, Path]:
    """Files that measure_accuracy reads, for the two prompts above."""
    folder.mkdir(parents=True)
    rows = [
        dict.fromkeys(SUBSET.names)
        | {"prompt_id": p, "prompt": p, "image_ids": [f"{p}-{i}" for i in range(3)], "archives": ["z"] * 3}
        | {"ranks": RANKS[p], "position": position}
        for position, p in enumerate(RANKS)
    ]
    write_preferences(folder / "subset.parquet", rows, SUBSET)
    table = [
        {
            "prompt_id": p,
            "image_id": f"{p}-{i}",
            "k": k,
            "soft": soft[p][i][k],
            "hard": hard[p][i][k],
            "forced": float(k),
        }
        for p in RANKS
        for i in range(3)
        for k in range(2)
    ]
    pq.write_table(pa.Table.from_pylist(table, SCORE), folder / "scores.parquet")
    truth = {
        "image_id": [f"{p}-{i}" for p in RANKS for i in range(3)],
        "utility": [u for p in RANKS for u in UTILITY[p]],
    }
    pq.write_table(pa.table(truth), folder / "truth-test.parquet")
    record = {
        "source": "synthetic",
        "revision": "seed 0",
        "measured": {"second_annotator_agreement": 0.65},
        "files": {"truth-test.parquet": file_record(folder / "truth-test.parquet")},
    }
    write_json(folder / "dataset.json", record)
    files = {"scores": "scores.parquet", "subset": "subset.parquet", "record": "dataset.json"}
    return {name: with_sidecar(folder / file) for name, file in files.items()}


def brute_force(values: Any, order: Any, k: int, tie: float, missing: float) -> dict[str, list[float]]:
    """Credit of every strict pair of each prompt at Mean@k, over all subsets of two rollouts; nan is dropped."""
    found: dict[str, list[float]] = {}
    for p, ranks in order.items():
        found[p] = []
        for chosen in combinations(range(2), k):
            score = []
            for rollouts in values[p]:
                present = [rollouts[i] for i in chosen if rollouts[i] is not None]
                score.append(mean(present) if present else None)
            for i, j in combinations(range(3), 2):
                if ranks[i] == ranks[j]:
                    continue
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                if score[better] is None or score[worse] is None:
                    found[p].append(missing)
                elif score[better] == score[worse]:
                    found[p].append(tie)
                else:
                    found[p].append(float(score[better] > score[worse]))
    return found


def averages(credit: dict[str, list[float]]) -> dict[str, float]:
    """Micro and macro average of credits."""
    kept = {p: [c for c in values if not math.isnan(c)] for p, values in credit.items()}
    return {"micro": mean(c for values in kept.values() for c in values), "macro": mean(map(mean, kept.values()))}


MEASURING = load({"scoring": {"report_k": [1, 2], "bootstrap": {"resamples": 100}}, "rollouts": {"block_size": 2}})


def test_accuracies_are_those_of_brute_force_under_every_rule(run_main: Any, with_sidecar: Any, tmp_path: Path) -> None:
    inputs = measured_inputs(tmp_path / "in", with_sidecar, SOFT, HARD)
    config = MeasureAccuracy.of(MEASURING, "imagereward", "grpo", "imagereward", 0)
    output, prompts = tmp_path / "imagereward.json", tmp_path / "imagereward-prompts.parquet"
    run_main("measure_accuracy", config, **inputs, accuracy=output, prompts=prompts)
    record = json.loads(output.read_text())
    assert (record["prompts"], record["images"], record["rollouts"]) == (2, 6, 2)
    assert (record["data_source"], record["forced_share"]) == ("synthetic", 0.5)
    assert record["missing_answer_share"] == pytest.approx(1 / 12)
    assert record["official"] == {"tie": "wrong", "average": "micro", "label_tie": "dropped"}
    rules: dict[str, float] = {"wrong": 0.0, "half": 0.5, "right": 1.0, "dropped": math.nan}
    orders = {"labels": RANKS, "noise-free order": {p: [-u for u in UTILITY[p]] for p in UTILITY}}
    seen = 0
    for cell in record["cells"]:
        if cell["method"] in ("soft", "hard") and cell["missing"] != "neutral" and cell["label_tie"] == "dropped":
            values = SOFT if cell["method"] == "soft" else HARD
            credit = brute_force(values, orders[cell["against"]], cell["k"], rules[cell["tie"]], rules[cell["missing"]])
            assert cell["estimate"] == pytest.approx(averages(credit)[cell["average"]], abs=1e-12), cell
            seen += 1
    assert seen == 2 * 2 * 2 * 4 * 2 * 2  # methods, k, targets, tie rules, missing rules, averages


def cells(record: dict[str, Any], **wanted: Any) -> list[float]:
    """Accuracies under a rule."""
    return [cell["estimate"] for cell in record["cells"] if wanted.items() <= cell.items()]


def test_accuracies_checked_by_hand(run_main: Any, with_sidecar: Any, tmp_path: Path) -> None:
    inputs = measured_inputs(tmp_path / "in", with_sidecar, SOFT, HARD)
    config = MeasureAccuracy.of(MEASURING, "imagereward", "grpo", "imagereward", 0)
    output = tmp_path / "imagereward.json"
    run_main("measure_accuracy", config, **inputs, accuracy=output, prompts=tmp_path / "imagereward-prompts.parquet")
    record = json.loads(output.read_text())
    official = {"tie": "wrong", "average": "micro", "label_tie": "dropped", "missing": "wrong", "against": "labels"}
    # Rollout 0: 3 of 3 and 1 of 2; rollout 1: 2 of 3 (a tie) and 2 of 2.
    assert cells(record, method="soft", k=1, **official) == [pytest.approx((4 / 5 + 4 / 5) / 2)]
    # Mean of both: 5.25, 4.75, 2.75 and 4.5, 3.25, 3.25.
    assert cells(record, method="soft", k=2, **official) == [pytest.approx(5 / 5)]
    # Sampled answers: 2 of 3 (a tie) and 1 of 2 (a tie); then 0 of 3 (a tie, two missing) and 2 of 2.
    assert cells(record, method="hard", k=1, **official) == [pytest.approx((3 / 5 + 2 / 5) / 2)]
    assert cells(record, method="hard", k=1, **(official | {"tie": "half"})) == [pytest.approx((4 / 5 + 2.5 / 5) / 2)]
    # A missing rating is the middle one, 4: the second rollout of p0 then has 2 of 3.
    neutral = official | {"missing": "neutral"}
    assert cells(record, method="hard", k=1, **neutral) == [pytest.approx((3 / 5 + 4 / 5) / 2)]
    assert cells(record, method="first listed", **official) == [1.0]
    # The noise-free order has p1's first image last and no tie: p0 as before, p1 has 1 of 3.
    free = official | {"against": "noise-free order"}
    assert cells(record, method="first listed", **free) == [pytest.approx((3 + 1) / 6)]
    ceiling = {"method": "noise-free order", "tie": "half", "average": "micro", "against": "labels"}
    assert cells(record, **ceiling) == [pytest.approx(3 / 5)]


def test_hpdv2_counts_ties_as_right_and_averages_over_prompts(run_main: Any, with_sidecar: Any, tmp_path: Path) -> None:
    scaled = {p: [tuple(value / 8 for value in rollouts) for rollouts in rows] for p, rows in SOFT.items()}
    inputs = measured_inputs(tmp_path / "in", with_sidecar, scaled, {p: [(1, 0)] * 3 for p in RANKS})
    config = MeasureAccuracy.of(MEASURING, "hpsv2", "grpo", "hpsv2", 0)
    output = tmp_path / "hpsv2.json"
    run_main("measure_accuracy", config, **inputs, accuracy=output, prompts=tmp_path / "hpsv2-prompts.parquet")
    record = json.loads(output.read_text())
    official = {"tie": "right", "average": "macro", "label_tie": "right", "missing": "wrong", "against": "labels"}
    assert record["official"] == {name: official[name] for name in ("tie", "average", "label_tie")}
    # Of three pairs each: 3 and 2 (one inverted); then 3 (a tie) and 3.
    assert cells(record, method="soft", k=1, **official) == [pytest.approx((3 / 3 + 2 / 3 + 3 / 3 + 3 / 3) / 4)]
    assert cells(record, method="hard", k=1, **official) == [1.0]


def test_a_collapsed_policy_still_has_its_accuracies(run_main: Any, with_sidecar: Any, tmp_path: Path) -> None:
    same = {p: [(4, 4)] * 3 for p in RANKS}
    inputs = measured_inputs(tmp_path / "in", with_sidecar, same, same)
    config = MeasureAccuracy.of(MEASURING, "imagereward", "grpo", "imagereward", 0)
    output = tmp_path / "imagereward.json"
    run_main("measure_accuracy", config, **inputs, accuracy=output, prompts=tmp_path / "imagereward-prompts.parquet")
    record = json.loads(output.read_text())
    for tie, accuracy in {"wrong": 0.0, "half": 0.5, "right": 1.0, "dropped": None}.items():
        rule = {"tie": tie, "average": "micro", "missing": "wrong", "against": "labels", "label_tie": "dropped"}
        assert cells(record, method="soft", k=1, **rule) == [accuracy]


@pytest.fixture
def tables(run_main: Any, with_sidecar: Any, tmp_path: Path) -> dict[str, Any]:
    """Tables made of a trained policy that is always right and a zero-shot policy as above."""
    right = {p: [(3.0 - rank, 3.0 - rank) for rank in ranks] for p, ranks in RANKS.items()}
    accuracies = []
    for policy, (soft, hard) in {"zeroshot": (SOFT, HARD), "grpo": (right, HARD)}.items():
        inputs = measured_inputs(tmp_path / policy / "in", with_sidecar, soft, hard)
        accuracies.append(tmp_path / policy / "imagereward.json")
        run_main(
            "measure_accuracy",
            MeasureAccuracy.of(MEASURING, "imagereward", policy, "imagereward", 0),  # type: ignore[arg-type]
            **inputs,
            accuracy=accuracies[-1],
            prompts=tmp_path / policy / "imagereward-prompts.parquet",
        )
    base, adapter = tmp_path / "manifest.json", tmp_path / "adapter_model.safetensors"
    write_json(base, {"repository": None, "path": "models/tiny-qwen2.5-vl"})
    adapter.write_bytes(b"weights")
    with_sidecar(base)
    seen = {"items_available": 900, "items_seen": 896, "epochs": 1.23456}
    write_json(tmp_path / "training.json", seen | {"warnings": ["the policy has collapsed"]})
    with_sidecar(adapter, config={"track": "imagereward", "seed": 0})
    outputs = {name: tmp_path / f"{name}.csv" for name in ("table1", "table2", "comparisons", "sensitivity")}
    run_main(
        "make_tables",
        MakeTables.of(MEASURING.model_copy(update={"tracks": ["imagereward"]})),
        accuracies=accuracies,
        base=base,
        adapters=[adapter],
        **outputs,
        markdown=tmp_path / "tables.md",
    )
    return {name: pd.read_csv(path) for name, path in outputs.items()} | {
        "markdown": (tmp_path / "tables.md").read_text()
    }


def test_table1_by_hand(tables: dict[str, Any]) -> None:
    labels, free = tables["table1"].to_dict("records")
    assert (labels["training_data"], labels["against"], labels["seed"]) == ("ImageReward", "labels", 0)
    assert (labels["mean@1"], labels["mean@2"], labels["gain"]) == (100.0, 100.0, 0.0)
    assert labels["mean@1_paper"] == 64.7
    assert (labels["n_prompts"], labels["n_pairs"], labels["rollouts"]) == (2, 5, 2)
    assert (labels["ceiling"], free["ceiling"]) == (60.0, 100.0)
    assert (labels["items_available"], labels["items_seen"], labels["epochs"]) == (900, 896, 1.235)
    assert (labels["data_source"], labels["model"]) == ("synthetic", "tiny-qwen2.5-vl")
    assert labels["notes"] == "the policy has collapsed"
    # The labels' order of p1 is wrong in 2 of its 3 noise-free pairs and ties in the other.
    assert (free["against"], free["n_pairs"], free["mean@1"]) == ("noise-free order", 6, 50.0)


def test_table2_by_hand(tables: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in tables["table2"].to_dict("records") if row["against"] == "labels"}
    assert list(rows) == [
        "Single human",
        "Zero-shot reasoning",
        "Zero-shot reasoning + soft reward",
        "Trained on ImageReward",
        "Trained on ImageReward + soft reward",
    ]
    assert [row["mean@1"] for row in rows.values()] == [65.0, 50.0, 80.0, 50.0, 100.0]
    assert [row["paper"] for row in rows.values()] == [65.1, 51.0, 55.4, 59.2, 64.9]
    assert rows["Zero-shot reasoning + soft reward"]["mean@2"] == 100.0
    assert {row["data_source"] for row in rows.values()} == {"synthetic"}
    assert [isinstance(row["notes"], str) for row in rows.values()] == [False, False, False, True, True]


def test_comparisons_by_hand(tables: dict[str, Any]) -> None:
    frame = tables["comparisons"]
    chosen = frame[(frame["against"] == "labels") & (frame["tie"] == "wrong")].set_index("claim")
    soft = chosen.loc["soft reward > sampled answer, zero-shot, Mean@1"]
    assert (soft["from"], soft["to"], soft["difference"]) == (50.0, 80.0, 30.0)
    trained = chosen.loc["trained > zero-shot, soft reward, Mean@1"]
    assert (trained["from"], trained["to"], trained["difference"]) == (80.0, 100.0, 20.0)
    same = chosen.loc["trained > zero-shot, sampled answer, Mean@1"]
    assert same["difference"] == 0 and not same["holds"]
    half = frame[(frame["against"] == "labels") & (frame["tie"] == "half")].set_index("claim")
    assert half.loc["soft reward > sampled answer, zero-shot, Mean@1", "from"] == 65.0
    assert (frame["holds"] == (frame["difference_low"] > 0)).all()
    assert (frame["to"] - frame["from"] - frame["difference"]).abs().max() < 0.011


def test_sensitivity_has_every_rule(tables: dict[str, Any]) -> None:
    frame = tables["sensitivity"]
    wanted = {
        ("wrong", "half", "dropped"): "tie",
        ("micro", "macro"): "average",
        ("wrong", "neutral", "dropped"): "missing",
    }
    for values, column in wanted.items():
        assert set(values) <= set(frame[column])
    assert {"soft", "hard", "first listed"} <= set(frame["method"])
    chosen = frame[(frame["policy"] == "zeroshot") & (frame["method"] == "hard") & (frame["against"] == "labels")]
    by_tie = chosen[(chosen["k"] == 1) & (chosen["average"] == "micro") & (chosen["missing"] == "wrong")]
    assert dict(zip(by_tie["tie"], by_tie["accuracy"], strict=True))["half"] == 65.0


def test_the_markdown_shows_the_same_numbers(tables: dict[str, Any]) -> None:
    text = tables["markdown"]
    assert "Data source: synthetic" in text and "the policy has collapsed" in text
    assert "| Zero-shot reasoning + soft reward" in text and "80.0 [" in text


# ------------------------------------------------------------------------------------------------------------ rollouts


def test_an_adapter_of_another_base_policy_is_refused(run_main: Any, with_sidecar: Any, tmp_path: Path) -> None:
    inputs = {name: tmp_path / name for name in ("base", "adapter", "subset", "images")}
    for path in inputs.values():
        path.write_text(path.name)
        with_sidecar(path, inputs={str(tmp_path / "another" / "manifest.json"): "digest of another manifest"})
    config = GenerateRollouts.of(Configuration(), "imagereward", "grpo", "imagereward", 0, 0, 0)
    with pytest.raises(
        PolicyError, match=r"adapter was trained on another base policy than .*base \(.*; train it again"
    ):
        run_main("generate_rollouts", config, **inputs, rollouts=tmp_path / "rollouts.parquet")


# ------------------------------------------------------------------------------------------------------------ training


def test_a_training_killed_after_its_last_checkpoint_does_no_step_more(
    run_main: Any, training_inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"steps": 2, "prompts_per_step": 2, "group_size": 4, "validate_every": 1, "warmup_steps": 0}
    small |= {"learning_rate_schedule": "constant_with_warmup"}  # so that one step more would be another adapter
    config = TrainGrpo.of(load({"training": {"imagereward": small}}), "imagereward", 0)

    def train(folder: Path) -> dict[str, Any]:
        files = {name.split(".")[0]: folder / name for name in ("adapter.safetensors", "adapter_config.json")}
        files |= {"record": folder / "training.json", "checkpoints": folder / "checkpoints"}
        return run_main("train_grpo", config, **training_inputs, **files)

    train(tmp_path / "undisturbed")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(train_grpo, "replacing", Mock(side_effect=RuntimeError("killed")))
        train(tmp_path / "killed")
    sidecar = train(tmp_path / "killed")
    assert sidecar["metrics"]["resumed_from_step"] == 2
    assert json.loads((tmp_path / "killed" / "training.json").read_text())["warnings"] == sidecar["warnings"]
    for name in ("adapter.safetensors", "adapter_config.json", "training.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


def test_the_adapter_that_is_kept_validates_best_or_is_the_last(
    run_main: Any, training_inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"prompts_per_step": 2, "group_size": 4, "validate_every": 1, "warmup_steps": 0}
    small |= {"learning_rate_schedule": "constant_with_warmup"}  # so that the first step is that of a shorter training

    def train(name: str, **settings: Any) -> tuple[dict[str, Any], bytes]:
        config = TrainGrpo.of(load({"training": {"imagereward": small | settings}}), "imagereward", 0)
        folder = tmp_path / name
        files = {name.split(".")[0]: folder / name for name in ("adapter.safetensors", "adapter_config.json")}
        files |= {"record": folder / "training.json", "checkpoints": folder / "checkpoints"}
        run_main("train_grpo", config, **training_inputs, **files)
        return json.loads(files["record"].read_text()), files["adapter"].read_bytes()

    accuracies = iter([0.5, 0.9, 0.6] * 2 + [0.5, 0.9])
    validate = Validation.__call__
    monkeypatch.setattr(
        Validation,
        "__call__",
        lambda *given: (
            (found := validate(*given))[0] | {"eval_soft_pair_accuracy": next(accuracies)},
            found[1],
        ),
    )
    (best, first), (last, second) = train("best", steps=2, keep="best"), train("last", steps=2, keep="last")
    assert (best["kept_step"], best["kept_soft_pair_accuracy"]) == (1, 0.9)
    assert (last["kept_step"], last["kept_soft_pair_accuracy"]) == (2, 0.6)
    assert first == train("shorter", steps=1)[1] != second


def test_a_training_that_resumes_in_a_later_pass_sees_the_same_items(
    run_main: Any, training_inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"epochs": 1.5, "prompts_per_step": 10, "group_size": 2, "validate_every": 1, "warmup_steps": 0}
    config = TrainGrpo.of(load({"training": {"imagereward": small}}), "imagereward", 0)
    asked: set[bytes] = set()

    def recording(model: Any, inputs: Any, *rest: Any) -> Any:
        patches = inputs["image_grid_thw"].prod(dim=1).tolist()
        asked.update(image.numpy().tobytes() for image in inputs["pixel_values"].split(patches))
        return sample_completions(model, inputs, *rest)

    def train(folder: Path) -> dict[str, Any]:
        files = {name.split(".")[0]: folder / name for name in ("adapter.safetensors", "adapter_config.json")}
        files |= {"record": folder / "training.json", "checkpoints": folder / "checkpoints"}
        return run_main("train_grpo", config, **training_inputs, **files)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "sample_completions", recording)
        train(tmp_path / "undisturbed")
    record = json.loads((tmp_path / "undisturbed" / "training.json").read_text())
    items = len({name for row in pq.read_table(training_inputs["train"])["image_ids"].to_pylist() for name in row})
    steps = math.ceil(1.5 * items / 10)
    a_pass = items // 10
    assert a_pass < steps - 1  # or it would resume in the first
    assert record["history"][-1]["step"] == record["steps"] == steps
    assert record["epochs"] == steps * 10 / items > 1.5 and record["items_available"] == items
    assert record["items_seen"] == len(asked) > a_pass * 10

    def killed_late(self: Validation, model: Any, untrained: Any) -> Any:
        called.append(untrained)
        if len(called) == steps + 1:
            raise RuntimeError("killed")
        return validate(self, model, untrained)

    validate, called = Validation.__call__, list[Any]()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Validation, "__call__", killed_late)
        train(tmp_path / "killed")
    sidecar = train(tmp_path / "killed")
    assert sidecar["metrics"]["resumed_from_step"] == steps - 1
    # Beside the items, the comparison with the untrained policy has survived.
    for name in ("adapter.safetensors", "training.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name
    validated = {entry["step"]: entry for entry in record["history"] if "eval_soft_pair_accuracy" in entry}
    gains = {step: entry.get("eval_soft_pair_accuracy_gain") for step, entry in validated.items()}
    accuracies = {step: entry["eval_soft_pair_accuracy"] for step, entry in validated.items()}
    assert gains == {0: None} | {n: pytest.approx(accuracies[n] - accuracies[0]) for n in range(1, steps + 1)}


def start_training(inputs: dict[str, Path], folder: Path) -> subprocess.Popen[str]:
    """Start a small training in a process of its own, tracked in a store of the folder."""
    folder.mkdir(exist_ok=True)
    small = {"steps": 6, "prompts_per_step": 2, "group_size": 4, "validate_every": 2, "warmup_steps": 0}
    config = TrainGrpo.of(load({"training": {"imagereward": small}}), "imagereward", 0)
    files = inputs | {"adapter": folder / "adapter_model.safetensors", "adapter_config": folder / "adapter_config.json"}
    files |= {"record": folder / "training.json", "checkpoints": folder / "checkpoints"}
    command = [sys.executable, "-m", "workflow_scripts.stages.train_grpo", "--config", config.canonical()]
    for name, path in files.items():
        command += [f"--{name}", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> None:
    """Wait for a process that must succeed."""
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_adapter(
    training_inputs: dict[str, Path], tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finished(start_training(training_inputs, undisturbed))
    process = start_training(training_inputs, killed)
    while not any(map(last_complete_checkpoint, killed.glob("checkpoints/*"))):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    # A second process must not write beside the first.
    process.send_signal(signal.SIGSTOP)
    try:
        second = start_training(training_inputs, killed)
        assert "adapter_model.safetensors is being made by another process" in second.communicate(timeout=300)[1]
    finally:
        process.kill()
        process.communicate()
    assert not (killed / "adapter_model.safetensors").exists()
    finished(start_training(training_inputs, killed))

    # The record holds loss, rewards and gradients of every step, so equal bytes mean an equal course.
    for name in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not [path for path in (killed / "checkpoints").glob("*") if path.is_dir()]
    for folder, resumed_from in ((undisturbed, None), (killed, 2)):
        client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
        (run,) = client.search_runs(["1"], "attributes.status = 'FINISHED'")
        assert [point.step for point in client.get_metric_history(run.info.run_id, "train/reward")] == list(range(1, 7))
        assert run.data.metrics.get("resumed_from_step") == resumed_from
    history = json.loads((killed / "training.json").read_text())["history"]
    assert [entry["step"] for entry in history if "reward" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in history if "eval_soft_pair_accuracy" in entry] == [0, 2, 4, 6]
