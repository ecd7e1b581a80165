"""The real workflow at the size of configs/test.yaml, run once, and what must hold of its results."""

import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import mlflow
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from checkout import Workflow

from workflow_scripts.commands.log_runs import log_runs
from workflow_scripts.commands.reproduce import report
from workflow_scripts.files.paths import ROOT
from workflow_scripts.reporting.expectation import EXPECTED, VERIFIED, Comparison, Difference, compare, is_verified
from workflow_scripts.running.arithmetic import is_capable, processor
from workflow_scripts.running.provenance import verify
from workflow_scripts.tracking.pages import curve_name

TEXT = "".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
RULES = {copy or rule for rule, copy in re.findall(r"^(?:use )?rule (\w+)(?: as (\w+) with)?:", TEXT, re.M)}
# Of other data and policies than those of configs/test.yaml.
OTHER_SOURCES = {"download_dataset", "cold_start_policy", "record_own_data", "rank_own_images"}


@pytest.fixture(scope="session")
def jobs(workflow: Workflow) -> list[dict[str, Any]]:
    """Return every job with its outputs, its sidecar checked against them, and its MLflow run."""
    client = mlflow.MlflowClient(workflow.uri)
    found = list(workflow.jobs().values())
    for job in found:
        (sidecar,) = [path for path in job["outputs"] if path.name.endswith(".provenance.json")]
        job["sidecar"] = verify(sidecar.with_name(sidecar.name.removesuffix(".provenance.json")))
        job["run"] = client.get_run(job["sidecar"]["mlflow_run_id"])
    return found


# -------------------------------------------------------------------------------------------------------------- tables


def test_table1_has_its_rows(workflow: Workflow) -> None:
    table = pd.read_csv(workflow.results / "table1.csv")
    rows = table[["training_data", "test_data", "against"]].apply(tuple, axis=1).tolist()
    pairs = [("ImageReward", "ImageReward"), ("HPSv2 (25% subset)", "HPDv2"), ("HPSv2 (25% subset)", "ImageReward")]
    assert rows == [(*pair, against) for pair in pairs for against in ("labels", "noise-free order")]
    for k in (1, 3):
        for name in ("", "_se", "_low", "_high"):
            assert table[f"mean@{k}{name}"].between(0, 100).all()
    assert table[["mean@1_paper", "mean@3_paper"]].values.tolist()[0] == [64.7, 64.9]
    assert table[["mean@1_paper", "mean@3_paper"]].values.tolist()[2] == [65.1, 65.4]
    assert set(table["data_source"]) == {"synthetic"} and set(table["model"]) == {"tiny-qwen2.5-vl"}
    assert table["n_prompts"].tolist() == [10, 10, 8, 8, 10, 10]
    assert (table["n_pairs"] > 0).all() and table["protocol"].notna().all() and (table["rollouts"] == 3).all()


def hold_to_expectation(comparison: Comparison) -> None:
    """Fail at tables with other digits where these are verified on the processors used; else warn of differences."""
    if comparison.cells and all(is_verified(processor) for processor in comparison.processors):
        pytest.fail(report(comparison), pytrace=False)
    if comparison.cells or comparison.files:
        warnings.warn(report(comparison), stacklevel=2)


def test_the_tables_have_the_committed_digits(workflow: Workflow) -> None:
    hold_to_expectation(compare(workflow.results, EXPECTED / "test"))


def test_other_digits_fail_where_they_are_verified_and_warn_elsewhere() -> None:
    (verified, *_) = yaml.safe_load((EXPECTED / VERIFIED).read_text(encoding="utf-8"))
    known, other = {"name": "known"} | verified, {"name": "other"} | verified | {"vendor": "another vendor"}
    cell = Difference("table1", "labels | 0", "mean@1", "66.7", "66.8")
    with warnings.catch_warnings(action="error"):
        hold_to_expectation(Comparison(EXPECTED / "test", [], [], [known]))
    with pytest.warns(UserWarning, match=r"scores/a\.parquet\n(.*\n)*equal to the published table"):
        hold_to_expectation(Comparison(EXPECTED / "test", [], ["scores/a.parquet"], [known]))
    with pytest.raises(pytest.fail.Exception, match=r"labels \| 0 +mean@1 +66\.7 +66\.8"):
        hold_to_expectation(Comparison(EXPECTED / "test", [cell], [], [known]))
    for processors in ([other], [known, other]):
        with pytest.warns(UserWarning, match=r"labels \| 0 +mean@1 +66\.7 +66\.8"):
            hold_to_expectation(Comparison(EXPECTED / "test", [cell], [], processors))


def test_table2_has_its_rows(workflow: Workflow) -> None:
    table = pd.read_csv(workflow.results / "table2.csv")
    labels = table[table["against"] == "labels"]
    assert labels["method"].tolist() == [
        "Single human",
        "Zero-shot reasoning",
        "Zero-shot reasoning + soft reward",
        "Trained on ImageReward",
        "Trained on ImageReward + soft reward",
    ]
    assert labels["paper"].tolist() == [65.1, 51.0, 55.4, 59.2, 64.9]
    assert {"mean@1", "mean@3", "mean@1_low", "mean@1_high", "n_pairs", "seed", "forced_percent"} <= set(table.columns)
    assert set(table["data_source"]) == {"synthetic"}


def test_people_can_read_the_tables(workflow: Workflow) -> None:
    text = (workflow.results / "tables.md").read_text()
    assert "Data source: synthetic" in text and "Table 1" in text and "Table 2" in text
    value = pd.read_csv(workflow.results / "table1.csv")["mean@1"][0]
    assert f"| {value:.1f} [" in text
    for name in ("comparisons", "sensitivity"):
        assert len(pd.read_csv(workflow.results / f"{name}.csv")) > 10


def soft(row: dict[str, Any], answers: range) -> float:
    """Expected answer of a recorded rollout."""
    return sum(a * math.exp(p) for a, p in zip(answers, row["answer_logprobs"], strict=True))


def recorded(workflow: Workflow, track: str, policy: str, test: str) -> list[dict[str, Any]]:
    """All recorded rollouts of a policy on a test set."""
    folder = workflow.results / "rollouts" / track / policy / "seed0" / test
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def accuracy(
    workflow: Workflow, track: str, policy: str, test: str, k: int, score: Callable[[dict[str, Any]], float | None]
) -> float:
    """Accuracy at Mean@k under the official protocol of the test set, in percent, from the recorded rollouts alone."""
    scores: dict[tuple[str, int], list[float | None]] = defaultdict(list)
    for row in recorded(workflow, track, policy, test):
        scores[row["candidate"], row["k"]].append(score(row))
        if row["anchor"]:
            scores[row["anchor"], row["k"]] = [0.5]
    single = {key: values[0] for key, values in scores.items() if len(values) == 1}
    assert len(single) == len(scores)
    prompts = pq.read_table(workflow.results / "datasets" / test / "test" / "subset.parquet").to_pylist()
    by_prompt = []
    for row in prompts[: {"imagereward": 10, "hpsv2": 8}[test]]:
        credits = []
        for chosen in combinations(range(3), k):
            means = []
            for image in row["image_ids"]:
                present = [s for s in (single[image, i] for i in chosen) if s is not None]
                means.append(mean(present) if present else None)
            for i, j in combinations(range(len(means)), 2):
                one, two = means[i], means[j]
                sign = row["ranks"][j] - row["ranks"][i]
                if test == "hpsv2":
                    credits.append(one is not None and two is not None and (one - two) * sign >= 0)
                elif sign:
                    credits.append(one is not None and two is not None and (one - two) * sign > 0)
        by_prompt.append(credits)
    if test == "hpsv2":
        return 100 * mean(mean(credits) for credits in by_prompt)
    return 100 * mean(credit for credits in by_prompt for credit in credits)


def pair_soft(row: dict[str, Any]) -> float:
    """Probability that the candidate is preferred over the anchor."""
    return soft(row, range(2)) if row["candidate_second"] else 1 - soft(row, range(2))


def test_table1_is_what_the_recorded_rollouts_say(workflow: Workflow) -> None:
    table = pd.read_csv(workflow.results / "table1.csv")
    labels = table[table["against"] == "labels"].reset_index()
    for k in (1, 3):
        expected = [
            accuracy(workflow, "imagereward", "grpo", "imagereward", k, lambda row: soft(row, range(1, 8))),
            accuracy(workflow, "hpsv2", "grpo", "hpsv2", k, pair_soft),
            accuracy(workflow, "hpsv2", "grpo", "imagereward", k, pair_soft),
        ]
        assert labels[f"mean@{k}"].tolist() == pytest.approx(expected, abs=0.00501)


def test_table2_is_what_the_recorded_rollouts_say(workflow: Workflow) -> None:
    table = pd.read_csv(workflow.results / "table2.csv")
    labels = table[table["against"] == "labels"].reset_index()
    scores: list[Callable[[dict[str, Any]], float | None]] = [
        lambda row: row["sampled_answer"],
        lambda row: soft(row, range(1, 8)),
    ]
    for k in (1, 3):
        expected = [
            accuracy(workflow, "imagereward", policy, "imagereward", k, score)
            for policy in ("zeroshot", "grpo")
            for score in scores
        ]
        assert labels[f"mean@{k}"].tolist()[1:] == pytest.approx(expected, abs=0.00501)


def test_every_item_has_its_rollouts(workflow: Workflow) -> None:
    for track, policy, test in [
        ("imagereward", "zeroshot", "imagereward"),
        ("imagereward", "grpo", "imagereward"),
        ("hpsv2", "zeroshot", "hpsv2"),
        ("hpsv2", "grpo", "imagereward"),
    ]:
        rows = recorded(workflow, track, policy, test)
        by_item = defaultdict(list)
        for row in rows:
            by_item[row["item_id"]].append(row["k"])
        assert all(sorted(ks) == [0, 1, 2] for ks in by_item.values())
        assert len({row["prompt_id"] for row in rows}) == {"imagereward": 10, "hpsv2": 8}[test]
    first, second = ({row["item_id"] for row in recorded(workflow, "hpsv2", p, "hpsv2")} for p in ("zeroshot", "grpo"))
    assert first == second  # the same anchors and orders, so the two policies are paired


# ---------------------------------------------------------------------------------------------------------------- jobs


def test_every_rule_ran_and_every_output_is_as_its_sidecar_says(jobs: list[dict[str, Any]], workflow: Workflow) -> None:
    assert {job["rule"] for job in jobs} == RULES - OTHER_SOURCES
    for job in jobs:
        sidecar = job["sidecar"]
        declared = {path for path in job["outputs"] if not path.name.endswith(".provenance.json")}
        assert {path.name for path in declared} == set(sidecar["outputs"]), job["rule"]
        assert sidecar["stage_key"] and sidecar["code_digest"] and sidecar["versions"]["torch"]
        assert sidecar["processor"] == processor() | {"instructions": "avx2" if is_capable() else "native"}
        assert sidecar["seconds"] > 0 and sidecar["peak_memory_megabytes"] > 0
    assert len(list(workflow.results.rglob("*.provenance.json"))) == len(jobs)
    assert not list(workflow.results.rglob("*.tmp")) and not list((workflow.results / "checkpoints").glob("*/"))


def test_inputs_are_what_the_jobs_before_wrote(jobs: list[dict[str, Any]], workflow: Workflow) -> None:
    written = {
        str(path.relative_to(workflow.folder)): job["sidecar"]["outputs"][path.name]["sha256"]
        for job in jobs
        for path in job["outputs"]
        if not path.name.endswith(".provenance.json")
    }
    for job in jobs:
        for path, digest in job["sidecar"]["inputs"].items():
            assert written[path] == digest, (job["rule"], path)
        assert bool(job["sidecar"]["inputs"]) != (job["rule"] in ("synthesize_dataset", "prepare_base_policy"))


@pytest.mark.parametrize("rule", sorted(RULES - OTHER_SOURCES))
def test_every_job_is_one_finished_run_with_every_output(
    rule: str, jobs: list[dict[str, Any]], workflow: Workflow
) -> None:
    client = mlflow.MlflowClient(workflow.uri)
    chosen = [job for job in jobs if job["rule"] == rule]
    assert chosen
    keys = {job["sidecar"]["stage_key"] for job in chosen}
    assert len(keys) == len(chosen)
    for job in chosen:
        run, sidecar = job["run"], job["sidecar"]
        assert run.info.status == "FINISHED" and run.data.tags["stage_key"] == sidecar["stage_key"]
        assert run.data.tags["upstream_runs"].split() == sidecar["upstream_runs"]
        attached = {entry.path for entry in client.list_artifacts(run.info.run_id)}
        assert {path.name for path in job["outputs"]} <= attached
        copies = Path(client.download_artifacts(run.info.run_id, ""))
        for path in job["outputs"]:
            assert (copies / path.name).read_bytes() == path.read_bytes()
        (log,) = client.list_artifacts(run.info.run_id, "log")
        assert sidecar["stage_key"] in (copies / log.path).read_text()
        assert len(run.inputs.dataset_inputs) == len(sidecar["inputs"])
        assert run.data.metrics["seconds"] > 0
        assert sidecar["metrics"].items() <= run.data.metrics.items() or rule == "make_tables"  # names are made safe
        assert "seed" not in sidecar["config"] or run.data.params["seed"] == str(sidecar["config"]["seed"])


def test_there_is_no_other_run(jobs: list[dict[str, Any]], workflow: Workflow) -> None:
    client = mlflow.MlflowClient(workflow.uri)
    experiment = client.get_experiment_by_name("softpref-test")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert {run.info.run_id for run in runs} == {job["run"].info.run_id for job in jobs}
    assert len({run.data.tags["stage_key"] for run in runs}) == len(runs) == len(jobs)


def test_training_curves_and_reasoning_traces_are_tracked(jobs: list[dict[str, Any]], workflow: Workflow) -> None:
    client = mlflow.MlflowClient(workflow.uri)
    for job in jobs:
        run_id = job["run"].info.run_id
        if job["rule"] == "train_grpo":
            for name, steps in {
                "train/reward": [1, 2, 3, 4],
                "train/reward_format": [1, 2, 3, 4],
                "train/kl": [1, 2, 3, 4],
                "train/completion_length": [1, 2, 3, 4],
                "validation/accuracy": [0, 2, 4],
                "validation/accuracy_se": [0, 2, 4],
                "validation/gain": [2, 4],
                "validation/gain_se": [2, 4],
                "validation/answer_share/1": [0, 2, 4],
            }.items():
                assert [point.step for point in client.get_metric_history(run_id, name)] == steps
        if job["rule"] == "generate_rollouts":
            traces = client.list_artifacts(run_id, "traces")
            assert len(traces) == 3
            path = client.download_artifacts(run_id, traces[0].path)
            assert "<answer>" in Path(path).read_text()


def traces_of(client: mlflow.MlflowClient, run_id: str, also: str = "") -> list[Any]:
    """Traces of a run."""
    experiment = client.get_run(run_id).info.experiment_id
    return list(client.search_traces(locations=[experiment], filter_string=f"attributes.run_id = '{run_id}'{also}"))


def test_galleries_are_of_the_tested_images_and_some_are_traces(jobs: list[dict[str, Any]], workflow: Workflow) -> None:
    mlflow.set_tracking_uri(workflow.uri)
    client = mlflow.MlflowClient(workflow.uri)
    galleries = [job for job in jobs if job["rule"] == "make_gallery"]
    assert len(galleries) == 5
    for job in galleries:
        rows = {(row["prompt_id"], row["image_id"]): row for row in pq.read_table(job["outputs"][0]).to_pylist()}
        config, run_id = job["sidecar"]["config"], job["run"].info.run_id
        path = job["outputs"][0].relative_to(workflow.results / "gallery")
        scores = pd.read_parquet(workflow.results / "scores" / path)
        prompts = {row["prompt_id"] for row in rows.values()}
        first = pq.read_table(workflow.results / "datasets" / config["test"] / "test" / "subset.parquet").to_pylist()[
            :6
        ]
        assert prompts == {row["prompt_id"] for row in first}
        means = scores[scores["prompt_id"].isin(prompts)].groupby(["prompt_id", "image_id"])["soft"].mean()
        assert {key: row["score"] for key, row in rows.items()} == pytest.approx(means.to_dict())
        found = traces_of(client, run_id)
        assert len(found) == 4
        for trace in found:
            row = rows[trace.info.tags["prompt_id"], trace.info.tags["image_id"]]
            expected = {"dataset": config["test"], "track": config["track"], "policy": config["policy"], "seed": "0"}
            assert expected.items() <= trace.info.tags.items()
            assert trace.info.tags["right"] == str(row["right"]).lower().replace("none", "unknown")
            root, *rollouts = trace.data.spans
            assert root.inputs["prompt"] == row["prompt"] and root.inputs["image"].startswith("mlflow-attachment://")
            assert root.outputs["score"] == pytest.approx(row["score"])
            for span, rollout in zip(rollouts, row["rollouts"], strict=True):
                assert span.outputs["thinking"] + span.outputs["answer"] == rollout["text"]
                assert list(span.outputs["answer_probabilities"].values()) == pytest.approx(
                    rollout["answer_probabilities"], abs=1e-4
                )
            expectations = {a.name: a.value for a in trace.info.assessments}
            assert expectations.get("human_rank") == row["human_rank"] and expectations.get("right") == row["right"]
        wrong = [trace for trace in found if trace.info.tags["right"] == "false"]
        filtered = traces_of(client, run_id, " and tags.right = 'false'")
        assert {t.info.trace_id for t in filtered} == {t.info.trace_id for t in wrong}


def shown_traces(client: mlflow.MlflowClient, run_id: str) -> list[Any]:
    """What the traces of a run show, without their ids and times."""
    return sorted(
        (
            trace.info.tags["prompt_id"],
            trace.info.tags["image_id"],
            {k: v for k, v in trace.info.tags.items() if "mlflow." not in k},
            [(span.name, span.outputs) for span in trace.data.spans],
            sorted((a.name, a.value) for a in trace.info.assessments),
        )
        for trace in traces_of(client, run_id)
    )


def content(client: mlflow.MlflowClient, run_id: str, checkout: Path) -> dict[str, Any]:
    """What a run shows, without what differs by when, where and by whom it was logged."""
    run = client.get_run(run_id)
    folder = Path(client.download_artifacts(run_id, ""))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in [name for name in files if name.endswith(".log")]:
        # The fixture has every job say what it imports; what it imports last is said after the live run took the log.
        files[name] = b"".join(line for line in files[name].splitlines(True) if not line.startswith(b"import time:"))
    tags = {name: value for name, value in run.data.tags.items() if name not in ("process", "upstream_runs")}
    tags["mlflow.note.content"] = re.sub(r"#/experiments/\d+/runs/\w+", "link", tags["mlflow.note.content"])
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "times": (run.info.start_time, run.info.end_time),
        "tags": {name: value for name, value in tags.items() if "artifact" not in name},
        "params": run.data.params,
        "metrics": run.data.metrics,
        "files": {name: text for name, text in files.items() if not name.endswith(".provenance.json")},
        "inputs": sorted(
            (
                i.dataset.name,
                i.dataset.digest,
                Path(json.loads(i.dataset.source)["uri"]).relative_to(checkout).as_posix(),
            )
            for i in run.inputs.dataset_inputs
        ),
    }


def test_runs_logged_afterwards_are_as_the_live_ones_were(
    jobs: list[dict[str, Any]], workflow: Workflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage, into an empty store and back; the new ids in the sidecars rerun nothing."""
    copy = workflow.copy(tmp_path / "softpref")
    monkeypatch.chdir(copy.folder)  # a run's data sets are named by paths from where snakemake ran
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "softpref-test")
    folders = [copy.results]
    outputs = list(copy.results.rglob("*.provenance.json"))
    before = {path: json.loads(path.read_text()) for path in outputs}
    store = f"sqlite:///{tmp_path}/other.db"
    mlflow.MlflowClient(store).create_experiment("softpref-test", artifact_location=(tmp_path / "files").as_uri())

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert log_runs(folders) == (len(jobs), 0, [])
    assert log_runs(folders) == (0, len(jobs), [])
    after = {path: json.loads(path.read_text()) for path in outputs}
    new_id = {before[path]["mlflow_run_id"]: after[path]["mlflow_run_id"] for path in outputs}
    assert len(new_id) == len(jobs) and not new_id.keys() & set(new_id.values())
    live, later = mlflow.MlflowClient(workflow.uri), mlflow.MlflowClient(store)
    for path in outputs:
        ids = {"mlflow_run_id", "upstream_runs"}
        assert {k: v for k, v in after[path].items() if k not in ids} == {
            k: v for k, v in before[path].items() if k not in ids
        }
        run_id = before[path]["mlflow_run_id"]
        links = sorted(new_id[upstream] for upstream in before[path]["upstream_runs"])
        assert after[path]["upstream_runs"] == links
        assert later.get_run(new_id[run_id]).data.tags["upstream_runs"].split() == links
        one = content(live, run_id, workflow.folder.resolve())
        other = content(later, new_id[run_id], copy.folder.resolve())
        if before[path]["stage"] == "train_grpo":
            # Speeds and the trainer's summary are in no file; all curves that are in training.json are there.
            history = json.loads((path.parent / "training.json").read_text())["history"]
            curves = {curve_name(name) for entry in history for name in entry if name != "step"}
            assert {"train/reward", "train/kl", "train/loss", "validation/accuracy"} <= curves
            for name in curves:
                points = [
                    {(point.step, point.value) for point in client.get_metric_history(number, name)}
                    for client, number in ((live, run_id), (later, new_id[run_id]))
                ]
                assert points[0] == points[1] != set(), name
            one["metrics"] = {name: value for name, value in one["metrics"].items() if name in other["metrics"]}
            assert curves | before[path]["metrics"].keys() <= one["metrics"].keys()
        assert one == other
        if before[path]["stage"] == "make_gallery":
            mlflow.set_tracking_uri(workflow.uri)
            shown = shown_traces(live, run_id)
            mlflow.set_tracking_uri(store)
            assert shown == shown_traces(later, new_id[run_id]) != []
        if before[path]["stage"] == "make_tables":
            note = live.get_run(run_id).data.tags["mlflow.note.content"]
            assert all(f"/runs/{upstream})" in note for upstream in before[path]["upstream_runs"])
            assert "Table 1" in note and f"{pd.read_csv(path.parent / 'table1.csv')['mean@1'][0]:.1f} [" in note
        (sidecar,) = [f for f in later.list_artifacts(new_id[run_id]) if f.path.endswith(".provenance.json")]
        assert json.loads(Path(later.download_artifacts(new_id[run_id], sidecar.path)).read_text()) == after[path]
    assert "Nothing to be done" in copy.snakemake("-n")

    # The first store has them all, so nothing is logged there again, and the sidecars name its runs again.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", copy.uri)
    assert log_runs(folders) == (0, len(jobs), [])
    assert {path: json.loads(path.read_text()) for path in outputs} == before
    test_there_is_no_other_run(jobs, copy)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_core_from_scratch_gives_the_same_bytes(workflow: Workflow, tmp_path: Path) -> None:
    again = Workflow.checkout(tmp_path / "again")
    again.snakemake("--cores", "1")
    for name in ("table1.csv", "table2.csv", "comparisons.csv", "sensitivity.csv", "tables.md"):
        assert (again.results / name).read_bytes() == (workflow.results / name).read_bytes(), name
    for path in sorted(workflow.results.rglob("*.parquet")) + sorted(workflow.results.rglob("*.safetensors")):
        other = again.results / path.relative_to(workflow.results)
        assert other.read_bytes() == path.read_bytes(), path
