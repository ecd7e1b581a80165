"""Texts of the MLflow pages: names of curves and inputs, parameters that tell runs apart, descriptions with links."""

import ast
import os
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from workflow_scripts.configuration.shown import CURVES, PARAMS
from workflow_scripts.files.instances import flat, instance_name
from workflow_scripts.files.paths import ROOT

NOTE = "mlflow.note.content"  # MLflow's tag for a description
LONGEST_NOTE = 7900  # MLflow cuts a tag at 8000 characters


def chosen_params(config: dict[str, Any]) -> dict[str, str]:
    """Parameters of a stage that the pages show, by dotted key."""
    leaves = flat(config)
    return {name: str(leaves[name]) for name in PARAMS if leaves.get(name) is not None}


def curve_name(name: str) -> str:
    """Name of a training curve, grouped: "reward" -> "train/reward", "eval_forced_share" -> "validation/forced_share".

    The mean of each reward stands beside the total: "train/reward_format". Totals that the trainer reports at its end
    form a group of their own: "train_runtime" becomes "trainer/runtime".
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
    """Short name of an input, with the folders that tell files of one base name apart."""
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
    for path, job in sorted(inputs.items()):  # a live run and one that is logged afterwards read the same
        # An input that the user made has no stage.
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
    """The sections of a Markdown text that fit into `room` characters, then `rest` in place of the others."""
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
