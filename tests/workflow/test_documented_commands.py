"""Every command of the documentation is run, in a finished checkout: as it stands where that is quick, else planned.

A block of commands that needs what is not here (a GPU, a cluster, the Hub) says so in its title: "dry run in the tests"
or, where there is none, "not run in the tests". What takes minutes is planned here, too, and named below with the test
that really runs it. The tutorial has a test of its own.
"""

import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
from checkout import Workflow, environment

from workflow_scripts.policy.prompts import RATINGS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("models/*/README.md"))]
BLOCK = re.compile(r"^( *)```bash(?: title=\"([^\"]*)\")?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SNAKEMAKE = r"(uv run )?(\.venv/bin/)?snakemake\b"
DRY, NOT = "dry run in the tests", "not run in the tests"

# Long ones, and some that change more than the checkout, by what they begin with: the test that runs them.
RUN_BY = {
    "snakemake --cores all results/table1.csv": "workflow/test_end_to_end.py",
    "snakemake --cores 1 --configfile configs/test.yaml": "workflow/test_end_to_end.py",
    "snakemake --cores all --configfile configs/three_seeds.yaml": "workflow/test_extending.py",
    "snakemake --cores all --configfile configs/own.yaml": "workflow/test_own_data_workflow.py",
    "snakemake --cores 1 results/policies/cold_start/model.safetensors": "policy/test_cold_start.py",
    "snakemake --cores all --config 'ranking=": "commands/test_rank.py",
    "python -m workflow_scripts rank": "commands/test_rank.py",
    "python -m workflow_scripts register": "ranking/test_served_policy.py",
    "python -m examples.judge_as_reward": "ranking/test_judge.py",
    "python -m workflow_scripts summary": "commands/test_summary.py",
    "python -m workflow_scripts reproduce": "commands/test_reproduce.py",
    "MLFLOW_TRACKING_URI=sqlite:///mlflow.db mlflow models serve": "ranking/test_served_policy.py",
    "curl": "ranking/test_served_policy.py",
    "make hub-demo": "external/test_hub_workflow.py",
    "ln -s": "workflow/test_moving.py",
    "python - /old/place": "workflow/test_moving.py",
    "python -m workflow_scripts log-runs": "commands/test_log_runs.py",
    "python -m workflow_scripts check-gpu": "commands/test_check_gpu.py",
}


class Command(NamedTuple):
    """A command as a page has it, and what the title of its block says of it."""

    page: str
    text: str
    title: str


def commands(pages: list[Path]) -> list[Command]:
    """Every command of some pages; a here-document is one command."""
    found = []
    for page in pages:
        for indent, title, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            text = re.sub(rf"^{indent}", "", block, flags=re.MULTILINE)
            lines = [text] if "<<" in text else re.sub(r"\\\n *", "", text).splitlines()
            for line in filter(None, (re.sub(r"\s+# .*$", "", line).strip() for line in lines)):
                found.append(Command(page.relative_to(ROOT).as_posix(), line, title))
    return found


def planned(command: str) -> str | None:
    """The dry run of a command that makes things; None for one that is run as it stands."""
    if re.match(SNAKEMAKE, command):
        return re.sub(SNAKEMAKE, "snakemake -n --quiet", command)
    if command.startswith("make "):
        return command.replace("make ", "make -n ", 1)
    if re.match(r"pytest\b", command):
        return command + " --collect-only -q"
    return None


def run_elsewhere(command: Command) -> bool:
    """Whether another test runs it."""
    return any(command.text.removeprefix("uv run ").startswith(known) for known in RUN_BY)


COMMANDS = commands([page for page in PAGES if page.name != "tutorial.md"])
HERE = {c.text: c for c in COMMANDS if not c.title.startswith(NOT) and not (run_elsewhere(c) and not planned(c.text))}


@pytest.fixture(scope="module")
def checkout(workflow: Workflow, tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """Return a copy of the finished workflow that commands may change, its environment in it as `make setup` has it."""
    copy = workflow.copy(tmp_path_factory.mktemp("documented") / "checkout")
    (copy.folder / ".venv").symlink_to(sys.prefix)
    return copy


def run(checkout: Workflow, command: str) -> str:
    """Run a command of bash in the checkout, which must succeed; return what it says."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(
        words, cwd=checkout.folder, env=environment() | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("command", HERE.values(), ids=[f"{c.page} {c.text[:60]}" for c in HERE.values()])
def test_a_command_of_the_documentation_works(checkout: Workflow, command: Command) -> None:
    if dry := planned(command.text):
        run(checkout, dry)
    elif command.text.startswith("mlflow "):
        serves(checkout, command.text)
    else:
        run(checkout, command.text)


def serves(checkout: Workflow, command: str) -> None:
    """Start a server as documented, on another port; it must answer."""
    port = "15617"
    words = [*shlex.split(re.sub(r"--port \d+", "", command)), "--port", port]
    server = subprocess.Popen(
        [sys.executable, "-m", *words], cwd=checkout.folder, env=environment(), start_new_session=True
    )
    try:
        for _ in range(300):
            assert server.poll() is None, command
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.read() == b"OK"
                return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"{command} does not answer")
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def test_what_is_only_planned_here_says_so_or_is_run_elsewhere() -> None:
    for command in COMMANDS:
        if re.match(SNAKEMAKE, command.text) and not re.search(" -n( |$)", command.text):
            assert command.title.startswith(DRY) or run_elsewhere(command), f"{command.page}: {command.text}"
        assert not command.title or command.title.startswith((DRY, NOT)), f"{command.page}: {command.title}"
    for test in RUN_BY.values():
        assert (ROOT / "tests" / test).is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    """All its commands in their order, in one clone."""
    checkout = Workflow.checkout(tmp_path / "clone")
    run(checkout, "git init -q && git add -A && git -c user.name=reader -c user.email=r@example.org commit -qm clone")
    said = {}
    for command in commands([ROOT / "docs/tutorial.md"]):
        if command.text in ("make setup", "source .venv/bin/activate", "snakemake --cores all"):
            continue  # the environment is this one; the last is the whole default
        if command.text.startswith("pytest"):
            with pytest.raises(AssertionError, match=rf"\b{len(RATINGS)} failed, ") as failed:
                run(checkout, command.text)
            wrong = re.findall(r"^ *FAILED \S+::(\w+)\[(\d)\]", str(failed.value), flags=re.MULTILINE)
            assert wrong == [("test_ratings_are_rewarded_by_their_distance", str(rating)) for rating in RATINGS]
        elif command.text.startswith("diff"):
            with pytest.raises(AssertionError, match=r"[<>]"):
                run(checkout, command.text)
        else:
            said[command.text] = run(checkout, command.text)

    def jobs(text: str) -> set[tuple[str, str]]:
        return set(re.findall(r"^([a-z_]+) +(\d+)$", text, flags=re.MULTILINE))

    weight, code = (text for command, text in said.items() if command.startswith("snakemake -n"))
    assert {("train_grpo", "1"), ("make_tables", "1")} <= jobs(weight) and ("train_grpo", "2") in jobs(code)
    assert not {name for name, _ in jobs(code)} & {"synthesize_dataset", "read_images", "prepare_base_policy"}
    (mine,) = (text for command, text in said.items() if command.endswith("mine.yaml") and "snakemake" in command)
    assert ("train_grpo", "2") in jobs(mine) and "synthesize_dataset" not in dict(jobs(mine))
    again = run(checkout, "snakemake -n --cores all --configfile configs/test.yaml")
    assert "Nothing to be done" in again


def test_the_site_builds_without_a_dead_link(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "tutorial.html").is_file()
