"""Rooms of the package: what each may import, how long their files are, and what stands outside of them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from workflow_scripts.files.paths import ROOT
from workflow_scripts.running.code_digest import PACKAGE

# From low to high: a room imports lower ones only. The first four know nothing of the domain.
ROOMS = (
    *("files", "configuration", "running", "tracking"),
    *("preferences", "scoring", "policy.fast", "policy", "rollouts", "training", "reporting", "ranking", "planning"),
    *("preflight", "reference", "stages", "commands"),
)
# No other room imports these, nor knows Snakemake, but for generators and what merges overlays as Snakemake does.
ON_TOP = ("stages", "commands", "tracking")
KNOW_SNAKEMAKE = (f"{PACKAGE}.commands.", f"{PACKAGE}.reference.", f"{PACKAGE}.configuration.overlays")
LONG_FILES = {"configuration/model.py"}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted((ROOT / PACKAGE).rglob("[!_]*.py"))
}


def room(module: str) -> str:
    """Room of a module of the package."""
    return module.removeprefix(f"{PACKAGE}.").rpartition(".")[0]


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, anywhere in it: those of the package by their own name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        for name in names:
            whole = f"{node.module}.{name}" if isinstance(node, ast.ImportFrom) else name
            yield whole if whole in MODULES else whole.rpartition(".")[0] if isinstance(node, ast.ImportFrom) else whole


IMPORTS = {module: sorted(set(imported(path))) for module, path in MODULES.items()}


def test_the_rooms_are_these() -> None:
    assert {room(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_lower_rooms_only(name: str) -> None:
    lower = ROOMS[: ROOMS.index(name) + 1]
    upward = [
        f"{module} imports {other}"
        for module in MODULES
        if room(module) == name
        for other in IMPORTS[module]
        if other in MODULES and room(other) not in lower
    ]
    assert not upward


def test_modules_import_in_no_circle() -> None:
    own = {module: [name for name in names if name in MODULES] for module, names in IMPORTS.items()}
    assert set(TopologicalSorter(own).static_order()) == MODULES.keys()


def test_rooms_know_no_stage_and_no_tracking() -> None:
    for module, names in IMPORTS.items():
        for name in names:
            if name in MODULES and room(module) not in ("stages", "commands"):
                assert room(name) not in ON_TOP or room(name) == room(module), f"{module} imports {name}"
            if name.split(".")[0] == "snakemake":
                assert module.startswith(KNOW_SNAKEMAKE), f"{module} imports {name}"


def test_no_stage_imports_another() -> None:
    for module, names in IMPORTS.items():
        assert room(module) != "stages" or not any(room(name) == "stages" for name in names if name in MODULES), module


def test_scoring_and_rewards_load_no_model_library() -> None:
    modules = [module for module in MODULES if room(module) == "scoring"] + [f"{PACKAGE}.training.rewards"]
    code = f"import importlib, sys; [importlib.import_module(name) for name in {modules}];"
    code += "print([n for n in ('torch', 'transformers', 'peft', 'trl', 'mlflow', 'snakemake') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "path", sorted((ROOT / PACKAGE).rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT / PACKAGE))
)
def test_files_and_functions_are_short(path: Path) -> None:
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT / PACKAGE).as_posix()
    lines = text.count("\n")
    assert name in LONG_FILES or lines <= (150 if name.startswith("stages/") else 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name


def test_every_module_is_in_a_room() -> None:
    assert {path.name for path in (ROOT / PACKAGE).glob("*.*")} == {"__init__.py", "__main__.py"}
