"""What was planned and what a run of the workflow recorded."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from checkout import Workflow

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.overlays import read_configuration
from workflow_scripts.files.paths import ROOT
from workflow_scripts.planning.devices import Assumptions, data_sheet
from workflow_scripts.planning.plan import Plan, plan
from workflow_scripts.policy.prompts import messages
from workflow_scripts.preferences.images import decoded
from workflow_scripts.preferences.schema import read_image_rows
from workflow_scripts.running.provenance import sidecar_path


@pytest.fixture(scope="module")
def planned() -> Plan:
    """Return the plan of configs/test.yaml, made before anything of it is read."""
    return plan(read_configuration([ROOT / "configs/test.yaml"]), data_sheet("l4"), Assumptions())


def sidecar(path: Path) -> dict[str, Any]:
    """What was recorded of a job."""
    found: dict[str, Any] = json.loads(sidecar_path(path).read_text())
    return found


def question_lengths(c: Configuration, rollouts: list[dict[str, Any]], processor: Any, images: Any) -> dict[str, int]:
    """Tokens of each item that was asked, counted by the processor from its prompt and its pictures."""
    prompts = {row["prompt_id"]: row["prompt"] for row in images["subset"]}
    found = {}
    for row in rollouts:
        if row["item_id"] in found:
            continue
        shown = row["item_id"].split("/")[1:]
        template = c.prompts.pairwise if row["anchor"] else c.prompts.pointwise
        chat = messages(template, prompts[row["prompt_id"]])
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = processor(text=[text], images=[images["pictures"][name] for name in shown])["input_ids"][0]
        found[row["item_id"]] = len(ids)
    return found


def test_the_plan_counts_what_the_run_records(workflow: Workflow, planned: Plan, policies: dict[str, Any]) -> None:
    """Items, rollouts and tokens of questions exactly; completions between nothing and their budget."""
    c = planned.configuration
    processor = policies["imagereward"].processor
    seen = 0
    for stage in planned.stages:
        kind, track, *rest = stage.name.split()
        if kind == "train_grpo":
            adapter = workflow.results / f"policies/{track}/seed0/adapter_model.safetensors"
            metrics, training = sidecar(adapter)["metrics"], getattr(c.training, track)
            assert metrics["training_items"] == stage.asked.items
            history = json.loads(adapter.with_name("training.json").read_text())["history"]
            steps = [entry for entry in history if "num_tokens" in entry]
            size = training.prompts_per_step * training.group_size
            assert len(steps) * size == stage.rollouts
            asked = steps[-1]["num_tokens"] - sum(size * entry["completions/mean_length"] for entry in steps)
            assert asked == pytest.approx(stage.prompt_tokens, rel=0.05)  # which items are drawn is not planned
            assert max(entry["completions/max_length"] for entry in steps) <= training.max_completion_tokens
        else:
            policy, _, test = rest
            rows = []
            for path in sorted((workflow.results / f"rollouts/{track}/{policy}/seed0/{test}").glob("*.parquet")):
                rows += pq.read_table(path).to_pylist()
            folder = workflow.results / f"datasets/{test}/test"
            files = sorted(folder.glob("images-*.parquet"))
            images = {
                "subset": pq.read_table(folder / "subset.parquet").to_pylist(),
                "pictures": {row["image_id"]: decoded(row["bytes"]) for row in read_image_rows(files)},
            }
            lengths = question_lengths(c, rows, processor, images)
            assert (len(lengths), len(rows)) == (stage.asked.items, stage.rollouts)
            assert len({row["prompt_id"] for row in rows}) == stage.asked.prompts
            assert (sum(lengths.values()), max(lengths.values())) == (stage.asked.tokens, stage.asked.longest)
            assert stage.prompt_tokens == stage.asked.tokens * c.rollouts.blocks
            completions = sum(len(row["completion_ids"]) for row in rows)
            assert 0 < completions <= stage.at_most
        seen += 1
    assert seen == 2 + 5


@pytest.mark.parametrize("dataset", ["imagereward", "hpsv2"])
def test_the_plan_selects_the_prompts_that_the_run_selects(workflow: Workflow, planned: Plan, dataset: Any) -> None:
    """By name, for each split: simulated from the configuration, and as read from what the run wrote."""
    from workflow_scripts.planning.workload import read_rows, selected_rows

    for split in ("train", "validation", "test"):
        written = read_rows(workflow.results / f"datasets/{dataset}/{split}/subset.parquet")
        expected = selected_rows(planned.configuration, dataset, split)  # type: ignore[arg-type]
        assert expected is not None
        if split == "test":
            written = written[: len(expected)]
        assert [(row.prompt_id, row.prompt) for row in expected] == [(row.prompt_id, row.prompt) for row in written]
        unreadable = 1 if split == "train" else 0
        images = [sum(len(row.images) for row in rows) for rows in (written, expected)]
        assert images[0] - images[1] in (0, unreadable)  # subsets still list what cannot be read
