"""What a change of the configuration or of the code reruns: docs/reruns.md against dry runs on a finished run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import Workflow, environment

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.files.paths import ROOT
from workflow_scripts.reference import reruns as rerun_matrix
from workflow_scripts.reference.configuration import leaves
from workflow_scripts.reference.reruns import modules, stages
from workflow_scripts.running.code_digest import PACKAGE, UNCOUNTED, module_closure

# configs/test.yaml takes data and policy from elsewhere, and ranks nothing.
NOT_RUN = {"download_dataset", "cold_start_policy", "record_own_data", "rank_own_images"}
SCORING = {"score_rollouts", "measure_accuracy", "make_gallery", "make_tables", "make_figures", "make_report"}
TRAINING = {"train_grpo", "generate_rollouts", *SCORING}
MODULES = sorted(f"{PACKAGE}/{module.replace('.', '/')}.py" for module in modules())


def page_rows(text: str, heading: str) -> dict[str, dict[str, str]]:
    """By key or module: the cells of its row that say something, by rule."""
    part = text.split(heading)[1].split("\n## ")[0]
    head, _, *lines = [re.split(r" *\| *", line)[1:-1] for line in part.splitlines() if line.startswith("|")]
    rules = [name.replace("<br>", "_") for name in head[1:]]
    return {
        name: {rule: cell for rule, cell in zip(rules, cells, strict=True) if cell}
        for names, *cells in lines
        for name in re.findall(r"`([\w.]+)`", names)
    }


@pytest.fixture(scope="module")
def page() -> str:
    """Return the committed page."""
    return (ROOT / "docs" / "reruns.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def by_key(page: str) -> dict[str, dict[str, str]]:
    """Return the rules that each key reruns, with how many of their jobs."""
    return page_rows(page, "## … a key of the configuration")


@pytest.fixture(scope="module")
def by_module(page: str) -> dict[str, dict[str, str]]:
    """Return the rules that run each module (●) or follow from one that does (○)."""
    return page_rows(page, "## … code")


# ---------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.cases(len(list(leaves(Configuration()))))
def test_the_page_is_what_dry_runs_say(workflow: Workflow, page: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "workflow_scripts.reference.reruns", "--output", str(tmp_path / "reruns.md")]
    subprocess.run(command, cwd=workflow.folder, env=environment(), check=True)
    assert (tmp_path / "reruns.md").read_text(encoding="utf-8") == page, "docs/reruns.md is stale; run `make reruns`"


def test_every_key_and_every_module_has_one_row(
    page: str, by_key: dict[str, dict[str, str]], by_module: dict[str, dict[str, str]]
) -> None:
    keys = [key for key, _, _ in leaves(Configuration())]
    assert len(keys) > 100 and sorted(by_key) == sorted(keys)
    assert sorted(by_module) == sorted(modules())
    assert all(page.count(f"`{name}`") == 1 for name in keys)


def test_there_is_a_column_for_every_rule() -> None:
    text = "".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    rules = re.findall(r"^(?:use )?rule (\w+)(?: as (\w+) with)?:", text, re.M)
    assert sorted(stages()) == sorted(copy or rule for rule, copy in rules)


def test_a_key_without_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = rerun_matrix.FinishedRun()
    monkeypatch.delitem(rerun_matrix.CHOSEN, "seeds")
    with pytest.raises(LookupError, match=r"seeds: no other valid value than \[0\] is known; add one to CHOSEN"):
        rerun_matrix.other_value(run, "seeds", list[int], [0])


def only(everything: dict[str, str], **wanted: str) -> None:
    """Compare the cells of a row with those named; "all" stands for every job of the rule."""
    assert everything == {rule: cell.replace("all", "●") for rule, cell in wanted.items()}


def test_named_keys_rerun_what_was_promised(by_key: dict[str, dict[str, str]]) -> None:
    for key, cells in by_key.items():
        section = key.split(".")[0]
        if key == "scoring.report_k":
            only(cells, measure_accuracy="all", make_tables="all", make_report="all")
        if key == "rollouts.blocks":
            only(cells, generate_rollouts="+8", **dict.fromkeys(SCORING, "all"))
        if section == "report":
            only(cells, make_gallery="all", make_report="all")
        if section == "scoring":
            assert set(cells) <= SCORING, key
        if section in ("tracking", "resources"):
            assert cells == {}, key
        if key == "distributed.processes":
            assert set(cells) == TRAINING and cells["train_grpo"] == "●"
        # Of no effect here: own data are not trained on, and vLLM needs a GPU.
        unused = key.startswith("training.own.") or ".vllm." in key
        if section == "training" and unused:
            assert cells == {}, key
        elif section == "training":
            assert set(cells) == TRAINING and cells["train_grpo"] == "● 1/2", key
        if ".hub." in key or ".cold_start." in key:
            assert cells == {}, key  # without effect while the source is another


# What the command line itself says of these, by rule and outputs.
REPORTED = {"measure_accuracy": 5, "make_tables": 1, "make_report": 1}
RESAMPLED = {**REPORTED, "make_figures": 1}
CASES = [
    ("scoring={report_k: [1, 2]}", REPORTED, {}),
    ("scoring={bootstrap: {seed: 1}}", RESAMPLED, {}),
    ("scoring={missing_answer: dropped}", RESAMPLED, {}),
    ("rollouts={blocks: 2}", {"score_rollouts": 5, "make_gallery": 5, **RESAMPLED}, {"generate_rollouts": 8}),
    (
        "training={hpsv2: {rewards: {exact: 2.0}}}",
        {"train_grpo": 1, "generate_rollouts": 3, "score_rollouts": 2, "measure_accuracy": 2, "make_gallery": 2}
        | {"make_tables": 1, "make_figures": 1, "make_report": 1},
        {},
    ),
    ("tracking={enabled: false, experiment: other, artifact_megabytes: 1, uri: 'sqlite:///other.db'}", {}, {}),
    ("datasets={hpsv2: {hub: {revision: other}}, imagereward: {hub: {train_set: 1k, path: /elsewhere}}}", {}, {}),
]


@pytest.mark.parametrize(("config", "again", "new"), CASES, ids=[config.split("=")[0] for config, *_ in CASES])
def test_a_changed_key_reruns_what_uses_it(
    workflow: Workflow, config: str, again: dict[str, int], new: dict[str, int]
) -> None:
    jobs = workflow.planned(config)
    for rerun, wanted in ((True, again), (False, new)):
        rules = [job.rule for job in jobs if job.reruns is rerun]
        assert {rule: rules.count(rule) for rule in rules} == wanted, jobs
    if "hpsv2: {rewards" in config:
        paths = [job.outputs[0] for job in jobs if job.rule not in ("make_tables", "make_figures", "make_report")]
        assert all("/hpsv2/" in path and "/zeroshot/" not in path for path in paths)
    if "blocks" in config:
        recorded = [path for job in jobs for path in job.outputs if "/rollouts/" in path]
        assert recorded and all("-0001.parquet" in path for path in recorded)


# ---------------------------------------------------------------------------------------------------------------- code


def test_named_modules_rerun_what_was_promised(by_module: dict[str, dict[str, str]]) -> None:
    for module, cells in by_module.items():
        if module.startswith("scoring.") and module != "scoring.pair_accuracy":
            assert cells and set(cells) <= {*SCORING, "rank_own_images"}, module
        if module.split(".")[0] in (*UNCOUNTED, "commands", "planning", "reference"):
            assert cells == {}, module
    for module in ("training.rewards", "scoring.pair_accuracy", "stages.train_grpo"):
        assert set(by_module[module]) == TRAINING | {"rank_own_images"}, module
    assert set(by_module["rollouts.record"]) == TRAINING - {"train_grpo"}


def test_cosmetic_changes_and_tracking_rerun_nothing(workflow: Workflow, tmp_path: Path) -> None:
    copy = workflow.copy(tmp_path / "copy")
    for name in MODULES:
        path = copy.folder / name
        head, *rest = path.read_text(encoding="utf-8").split('"""', 2)
        assert not head, f"{name} does not begin with its docstring"
        lines = rest[1].splitlines()
        imports = [i for i, line in enumerate(lines) if re.match(r"(import|from) [\w.]+( import [\w, ]+)?$", line)]
        for i, line in zip(imports, reversed([lines[i] for i in imports]), strict=True):
            lines[i] = line
        path.write_text('"""Other prose."""\n# A comment.\n' + "\n".join(lines) + "\n# The end.\n", encoding="utf-8")
    for name in MODULES:
        if Path(name).parts[1] in UNCOUNTED:
            with (copy.folder / name).open("a", encoding="utf-8") as file:
                file.write("\nADDED = 1\n")
    options = [sys.executable, "-m", "ruff", "format", "--quiet", "--line-length", "70", "--config"]
    subprocess.run([*options, "format.quote-style='single'", PACKAGE], cwd=copy.folder, check=True)
    changed = [name for name in MODULES if (copy.folder / name).read_bytes() != (ROOT / name).read_bytes()]
    assert changed == MODULES
    assert copy.planned() == []


EDITED = """
import json, sys
from workflow_scripts.files.paths import ROOT
from workflow_scripts.reference.reruns import FinishedRun
from workflow_scripts.running.code_digest import PACKAGE, code_digest

run = FinishedRun()
for module in sys.argv[1:]:
    path = ROOT / PACKAGE / f"{module.replace('.', '/')}.py"
    code = path.read_text(encoding="utf-8")
    path.write_text(code + "\\n\\nADDED = 1\\n", encoding="utf-8")
    code_digest.cache_clear()
    print(json.dumps([module, [job.rule for job in run.jobs(change={})]]), flush=True)
    path.write_text(code, encoding="utf-8")
"""


def rerun_by_code(workflow: Workflow, folder: Path, names: list[str]) -> dict[str, set[str]]:
    """Rules that a dry run announces after a change of each module's code, in a copy of the checkout."""
    copy = workflow.copy(folder)
    command = [sys.executable, "-c", EDITED, *names]
    done = subprocess.run(command, cwd=copy.folder, env=environment(), capture_output=True, text=True, check=True)
    return {module: set(rules) for module, rules in map(json.loads, done.stdout.splitlines())}


SOME = ["training.rewards", "scoring.bootstrap", "scoring.pair_accuracy", "stages.select_subset"]
OTHERS = [module for module in modules() if module not in SOME]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(SOME, id="some", marks=pytest.mark.cases(len(SOME))),
        pytest.param(OTHERS, id="others", marks=[pytest.mark.slow, pytest.mark.cases(len(OTHERS))]),
    ],
)
def test_a_change_of_code_reruns_what_the_page_says(
    names: list[str], workflow: Workflow, by_module: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    found = rerun_by_code(workflow, tmp_path / "copy", names)
    assert list(found) == names
    for module, rules in found.items():
        cells = by_module[module]
        own = {rule for rule, cell in cells.items() if cell == "●"}
        if own & NOT_RUN:  # what follows from these alone is not in this run
            assert own - NOT_RUN <= rules <= set(cells) and bool(rules) == bool(own - NOT_RUN), module
        else:
            assert rules == set(cells) - NOT_RUN, module


def test_the_digest_covers_what_every_job_loaded(workflow: Workflow) -> None:
    """The run was made with Python's own record of imports, which is in the log of each job."""
    found = {rule: set[str]() for rule in stages()}
    for log, job in workflow.jobs().items():
        said = (workflow.folder / log).read_text(encoding="utf-8")
        loaded = set(re.findall(rf"^import time:.*\| +({PACKAGE}\.[\w.]+)$", said, re.M))
        packages = {name for name in loaded if (ROOT / name.replace(".", "/") / "__init__.py").is_file()}
        found[job["rule"]] |= {name for name in loaded - packages if name.split(".")[1] not in UNCOUNTED}
    for rule in found.keys() - NOT_RUN:
        closure = set(module_closure(f"{PACKAGE}.stages.{stages()[rule]}", "transformers"))
        # What runs as the main program is not imported.
        assert found[rule] | {f"{PACKAGE}.stages.{stages()[rule]}"} == closure, rule
        engines = {name for name in found[rule] if name.endswith("_engine")}
        generates = rule in ("train_grpo", "generate_rollouts")
        assert engines == ({f"{PACKAGE}.rollouts.transformers_engine"} if generates else set())
