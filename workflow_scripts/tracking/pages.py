"""What MLflow's pages say: names of runs and curves, the parameters that tell runs apart, descriptions with links."""

import ast
import os
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from workflow_scripts.files.instances import INSTANCE_KEYS, flat, instance_name
from workflow_scripts.files.paths import ROOT

# What makes runs comparable, in the order of interest; all other keys stand in the provenance file beside it.
PARAMS = (
    *INSTANCE_KEYS,
    *("source", "hub.repository", "hub.revision", "bundled", "world.train_prompts", "world.test_prompts"),
    *("fraction", "by", "prompts", "drop_overlap"),
    *("protocol", "model.protocol", "model.max_pixels", "model.dtype"),
    *("training.steps", "training.prompts_per_step", "training.group_size", "training.learning_rate", "training.beta"),
    *("training.temperature", "training.loss_type", "training.scale_rewards", "training.lora.rank"),
    *("training.rewards.format", "training.rewards.exact", "training.rewards.approximate"),
    *("engine", "rollouts", "both_orders", "sampling.temperature", "sampling.max_thinking_tokens"),
    *("tracks", "seeds", "report_k", "missing_answer", "bootstrap.resamples"),
)
# Where the trainer's words are not the field's; the other curves only get their group.
CURVES = {
    "eval_soft_pair_accuracy": "validation/accuracy",
    "completions/mean_length": "train/completion_length",
    "completions/clipped_ratio": "train/completion_clipped_share",
    "frac_reward_zero_std": "train/share_of_groups_without_signal",
    "num_tokens": "train/tokens",
    "step_time": "train/seconds_per_step",
    "total_flos": "trainer/total_flos",
}
NOTE = "mlflow.note.content"  # MLflow's tag for a description
LONGEST_NOTE = 7900  # MLflow cuts a tag at 8000 characters
EXPERIMENT_NOTE = """Preference reasoning with soft rewards: every job of the workflow is one run.

| look at | |
|---|---|
| [the tables](#/experiments/{id}/runs?searchFilter=tags.stage%20%3D%20%27make_tables%27) | both tables of the paper, \
with the runs that they come from |
| [trainings](#/experiments/{id}/runs?searchFilter=tags.stage%20%3D%20%27train_grpo%27) | curves: `train/reward`, \
`train/kl`, `validation/accuracy`, `validation/answer_share/…` |
| [accuracies](#/experiments/{id}/runs?searchFilter=tags.stage%20%3D%20%27measure_accuracy%27) | of every policy on \
every test set |
| [traces](#/experiments/{id}/traces) | images with the thoughts about them, right or wrong |

Useful filters of runs: `tags.stage = 'train_grpo'`, `tags.track = 'hpsv2'`, `tags.policy = 'grpo'`,
`attributes.status = 'FAILED'`. Of traces: `tags.right`, `tags.confidence`, `tags.dataset`, `tags.policy`.
"""


def chosen_params(config: dict[str, Any]) -> dict[str, str]:
    """The parameters of a stage's config that are shown, by dotted key."""
    leaves = flat(config)
    return {name: str(leaves[name]) for name in PARAMS if leaves.get(name) is not None}


def curve_name(name: str) -> str:
    """Name of a training curve, grouped: "reward" -> "train/reward", "eval_forced_share" -> "validation/forced_share".

    The mean of each reward stands beside the total, "train/reward_format"; of what the trainer says at its end,
    "train_runtime" is "trainer/runtime".
    """
    if name in CURVES:
        return CURVES[name]
    if name.startswith("eval_"):
        return f"validation/{name.removeprefix('eval_')}"
    if name.startswith("train_"):
        return f"trainer/{name.removeprefix('train_')}"
    if name.startswith("rewards/") and name.endswith("/mean"):
        return f"train/reward_{name.split('/')[1]}"
    return f"train/{name}"


def input_name(path: str) -> str:
    """Short name of an input: its last folders tell files of one base name apart."""
    return "/".join(Path(path).parts[-3:])


def run_note(record: dict[str, Any], output: Path, inputs: dict[str, Any], experiment_id: str) -> str:
    """Description of a run in Markdown: what it is, what it was made from, how to repeat it, and its tables.

    Args:
        record: its sidecar, as far as it is known.
        output: its first output; Markdown among the outputs that are there becomes part of the description.
        inputs: sidecar of the job that made each input path, None where it is not known.
        experiment_id: of the runs that are linked.
    """
    made_by = defaultdict(list)
    for path, job in sorted(inputs.items()):  # a live run and one logged afterwards say the same
        # An input of the user's own has no stage.
        name, run_id = (
            (instance_name(job), job["mlflow_run_id"]) if job and "stage" in job else ("made elsewhere", None)
        )
        made_by[f"[{name}](#/experiments/{experiment_id}/runs/{run_id})" if run_id else name].append(input_name(path))
    sources = [f"- {name}: {', '.join(f'`{path}`' for path in paths)}" for name, paths in made_by.items()]
    shown = os.path.relpath(output)
    parts = [
        summary(record["stage"]),
        *(["**Made from**\n\n" + "\n".join(sources[:30])] if sources else []),
        "**Repeat** in the same checkout, with the same `--configfile` and `--config`\n\n"
        f"```\nsnakemake --cores all --force {output if shown.startswith('..') else shown}\n```",
    ]
    for name in record.get("outputs", {}):
        path = output.parent / name
        if path.suffix == ".md" and path.is_file():
            room = LONGEST_NOTE - len("\n\n".join(parts)) - 100
            parts.append(
                whole_sections(path.read_text(encoding="utf-8"), room, f"The rest is in the artifact `{name}`.")
            )
    return "\n\n".join(parts)[:LONGEST_NOTE]


def whole_sections(text: str, room: int, rest: str) -> str:
    """As many whole sections of a Markdown text as there is room for, with `rest` in place of those left out."""
    if len(text) <= room:
        return text
    first, *sections = text.split("\n## ")
    kept = [first]
    while sections and len("\n## ".join([*kept, sections[0]])) <= room:
        kept.append(sections.pop(0))
    return "\n## ".join(kept) + f"\n\n{rest}"


@cache
def summary(stage: str) -> str:
    """First line of a stage's documentation; read, since importing a stage takes seconds."""
    tree = ast.parse((ROOT / "workflow_scripts" / "stages" / f"{stage}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").splitlines()[0]
