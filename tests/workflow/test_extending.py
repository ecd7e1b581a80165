"""More rollouts and more test prompts extend what is recorded: byte for byte what a run from scratch gives."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from checkout import Workflow

RECORDED = ("rollouts/**/*.parquet", "datasets/*/test/images-*.parquet")
SCORES = "results/test/scores/imagereward/zeroshot/seed0/imagereward.parquet"
UNTRACKED: dict[str, Any] = {"tracking": {"enabled": False}}


def state(workflow: Workflow, *patterns: str) -> dict[str, tuple[int, bytes]]:
    """Modification time and bytes of files, by path under the results."""
    paths = [path for pattern in patterns for path in workflow.results.glob(pattern)]
    return {str(p.relative_to(workflow.results)): (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}


def contents(workflow: Workflow, *patterns: str) -> dict[str, bytes]:
    """Bytes of files, by path under the results."""
    return {name: data for name, (_, data) in state(workflow, *patterns).items()}


def test_more_blocks_and_prompts_make_what_is_missing_only(workflow: Workflow, tmp_path: Path) -> None:
    few = UNTRACKED | {"datasets": {"imagereward": {"test_prompts": 8}}}  # one full shard of 8
    more = UNTRACKED | {"datasets": {"imagereward": {"test_prompts": 12}}, "rollouts": {"blocks": 2}}

    extended = workflow.copy(tmp_path / "extended")
    for path in [*extended.results.glob("rollouts/**/0001-*"), *extended.results.glob("datasets/*/test/images-0001*")]:
        path.unlink()
    extended.snakemake("--cores", "2", SCORES, overlay=few)
    before = state(extended, *RECORDED)
    said = extended.snakemake("--cores", "2", SCORES, overlay=more)
    after = state(extended, *RECORDED)
    assert {name: after[name] for name in before} == before
    folder = "rollouts/imagereward/zeroshot/seed0/imagereward"
    new = {f"{folder}/{name}.parquet" for name in ("0000-0001", "0001-0000", "0001-0001")}
    assert after.keys() - before.keys() == new | {"datasets/imagereward/test/images-0001.parquet"}
    assert said.count("rule generate_rollouts:") == 3 and said.count("rule read_images:") == 1

    scratch = workflow.copy(tmp_path / "scratch")
    for part in ("rollouts", "scores", "datasets/imagereward/test"):
        shutil.rmtree(scratch.results / part)
    scratch.snakemake("--cores", "2", SCORES, overlay=more)
    compared = (
        f"{folder}/*.parquet",
        "datasets/imagereward/test/*.parquet",
        "scores/imagereward/zeroshot/**/*.parquet",
    )
    wanted = contents(scratch, *compared)
    assert len(wanted) == 4 + 4 + 1 and contents(extended, *compared) == wanted


def test_a_shard_that_was_cut_short_is_made_again(workflow: Workflow) -> None:
    # 10 prompts in shards of 8: the second one ends at 10, and 12 prompts make another one of it.
    jobs = workflow.planned(overlay={"datasets": {"imagereward": {"test_prompts": 12}}})
    recorded = [path for job in jobs for path in job.outputs if path.endswith(".parquet") and job.rule in RECORDING]
    assert recorded and all(job.reruns for job in jobs)
    assert all(Path(path).name in ("images-0001.parquet", "0001-0000.parquet") for path in recorded)


RECORDING = ("read_images", "generate_rollouts")


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_an_extended_run_is_the_run_from_scratch(tmp_path: Path) -> None:
    def overlay(prompts: int, blocks: int) -> dict[str, Any]:
        test: dict[str, Any] = {"test_prompts": prompts}
        hpsv2 = test | {"synthetic": {"test_prompts": 12}}
        rollouts = {"shard_prompts": 2, "blocks": blocks}  # 8 prompts are four full shards
        return UNTRACKED | {"datasets": {"imagereward": test, "hpsv2": hpsv2}, "rollouts": rollouts}

    extended = Workflow.checkout(tmp_path / "extended")
    extended.snakemake("--cores", "2", overlay=overlay(8, 1))
    kept = (*RECORDED, "policies/**/*.safetensors")
    before = state(extended, *kept)
    said = extended.snakemake("--cores", "2", overlay=overlay(10, 2))
    after = state(extended, *kept)
    assert {name: after[name] for name in before} == before
    # Five policies on their test sets with 4 shards of one block before, and 5 shards of two blocks after.
    assert said.count("rule generate_rollouts:") == 5 * (5 * 2 - 4)
    assert said.count("rule read_images:") == 2 and "rule train_grpo:" not in said

    scratch = Workflow.checkout(tmp_path / "scratch")
    scratch.snakemake("--cores", "2", overlay=overlay(10, 2))
    compared = ("*.csv", "*.md", "**/*.parquet", "**/*.safetensors", "accuracy/**/[!.]*-prompts.parquet")
    wanted = contents(scratch, *compared)
    assert len(wanted) > 100 and contents(extended, *compared) == wanted
