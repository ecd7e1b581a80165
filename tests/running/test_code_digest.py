"""Code digests: what changes them, what does not, and that they cover what shapes outputs."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from workflow_scripts.configuration.stages import STAGES
from workflow_scripts.files.paths import ROOT
from workflow_scripts.running import code_digest as module_under_test
from workflow_scripts.running.code_digest import PACKAGE, UNCOUNTED, code_digest, module_closure, named_files

ENGINES = ("transformers", "vllm")
CLOSURES = {
    (stage, engine): module_closure(f"{PACKAGE}.stages.{stage}", engine) for stage in STAGES for engine in ENGINES
}
COUNTED = {name: path for closure in CLOSURES.values() for name, path in closure.items()}
NOT_COUNTED = sorted(path for room in UNCOUNTED for path in (ROOT / PACKAGE / room).glob("[!_]*.py"))


def closure(stage: str, engine: str = "transformers") -> set[str]:
    """Modules that count for a stage, without the package's name."""
    return {name.removeprefix(f"{PACKAGE}.") for name in CLOSURES[stage, engine]}


def room(name: str) -> str:
    """Room of a module: the first name below the package's."""
    return name.split(".")[1]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Copy of the package that digests are taken of."""
    copy = tmp_path / PACKAGE
    shutil.copytree(ROOT / PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module_under_test, "ROOT", tmp_path)
    yield copy
    code_digest.cache_clear()


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    """Digest of every stage, of the code as it is in the checkout."""
    return digests()


def digests() -> dict[str, str]:
    """Digest of every stage, of the code as it is now."""
    code_digest.cache_clear()
    return {stage: code_digest(stage, "transformers") for stage in STAGES}


def changed(before: dict[str, str]) -> set[str]:
    """Stages whose digest is another one than before."""
    after = digests()
    return {stage for stage in STAGES if before[stage] != after[stage]}


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that must be there."""
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path} no longer contains {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_stages_differ(package: Path, before: dict[str, str]) -> None:
    assert sorted(STAGES) == sorted(path.stem for path in (package / "stages").glob("[!_]*.py"))
    assert digests() == before and len(set(before.values())) == len(STAGES)


def reformat(text: str) -> str:
    """The same code with other comments, line breaks, quotes and import order, and without docstrings."""
    tree = ast.parse(text)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    rest = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body[0] = ast.parse("'''Other prose.'''").body[0]
        if isinstance(node, ast.ImportFrom):
            node.names.reverse()
    lines = ['"""Another module docstring."""', "# a comment"]
    lines += [ast.unparse(node) for node in reversed(imports)]
    lines += ["\n\n\n" + ast.unparse(node) + "  # why" for node in rest]
    return "\n".join(lines) + "\n"


def test_a_reformat_changes_no_digest(package: Path, before: dict[str, str]) -> None:
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "__future__" not in text:
            path.write_text(reformat(text), encoding="utf-8")
    edit(package / "training/rewards.py", "# a comment", "# another comment\n\n\n\n")
    assert digests() == before


@pytest.mark.parametrize("length", [40, 80, 320])
def test_another_line_length_changes_no_digest(package: Path, length: int, before: dict[str, str]) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    style = ["--isolated", "--line-length", str(length), "--config", "format.quote-style='single'"]
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", *style, str(package)], check=True)
    reformatted = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    assert len(reformatted) > 30 and digests() == before


def test_a_touch_changes_no_digest(package: Path, before: dict[str, str]) -> None:
    for path in package.rglob("*.py"):
        os.utime(path)
    assert digests() == before


@pytest.mark.parametrize(
    ("module", "old", "new", "stages"),
    [
        ("training/rewards.py", "2: 0.5", "2: 0.4", {"train_grpo"}),
        ("training/items.py", "% 2:", "% 3:", {"train_grpo"}),
        ("scoring/image_scores.py", '"soft", "hard"', '"hard", "soft"', {"score_rollouts"}),
        (
            "scoring/bootstrap.py",
            "ddof=1",
            "ddof=0",
            {"measure_accuracy", "make_tables", "make_figures"},
        ),
        (
            "scoring/anchor_ranking.py",
            "ANCHOR_SCORE = 0.5",
            "ANCHOR_SCORE = 0.4",
            {"score_rollouts", "make_gallery", "make_figures", "make_report"},
        ),
        (
            "scoring/pair_accuracy.py",
            '"half": 0.5',
            '"half": 0.4',
            {"train_grpo", "score_rollouts", "measure_accuracy", "make_gallery", "make_tables"}
            | {"make_figures", "make_report"},
        ),
        ("rollouts/transformers_engine.py", "2**63", "2**62", {"train_grpo", "generate_rollouts"}),
        ("rollouts/items.py", '"anchor"', '"other"', {"train_grpo", "generate_rollouts"}),
        ("policy/tiny_qwen.py", "0.06", "0.05", {"cold_start_policy"}),
        ("preferences/synthetic_scenes.py", "SIDE = 84", "SIDE = 56", {"synthesize_dataset", "cold_start_policy"}),
        ("preferences/archives.py", "def iter_images", "x = 1\n\n\ndef iter_images", {"read_images"}),
    ],
)
def test_a_change_of_code_changes_the_stages_that_run_it(
    package: Path, before: dict[str, str], module: str, old: str, new: str, stages: set[str]
) -> None:
    edit(package / module, old, new)
    others = changed(before)
    assert stages <= others
    # Whoever else changed imports the module, too.
    name = module.removesuffix(".py").replace("/", ".")
    assert all(name in closure(stage, "transformers") for stage in others)


def functions(code: str) -> list[tuple[str, int, int]]:
    """Functions and methods of a module: name, the line after their last statement, and its indentation."""
    return [
        (node.name, node.body[-1].end_lineno or 0, node.body[-1].col_offset)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.unparse(node.body[-1]) != "..."
    ]


def with_more(code: str, *places: tuple[str, int, int]) -> str:
    """The module with one more statement at the end of some functions."""
    lines = code.splitlines()
    for _, line, indentation in sorted(places, key=lambda place: -place[1]):
        lines.insert(line, " " * indentation + "added = 1")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", sorted(COUNTED))
def test_a_change_of_any_function_that_counts_changes_a_digest(name: str, package: Path) -> None:
    stage, engine = min((key for key in CLOSURES if name in CLOSURES[key]), key=lambda key: len(CLOSURES[key]))
    path = package.parent / COUNTED[name].relative_to(ROOT)
    code = path.read_text(encoding="utf-8")
    found = {code_digest(stage, engine)}
    for place in functions(code):
        path.write_text(with_more(code, place), encoding="utf-8")
        code_digest.cache_clear()
        found.add(code_digest(stage, engine))
    assert len(found) == 1 + len(functions(code))


@pytest.mark.parametrize("path", NOT_COUNTED, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_change_in_an_uncounted_room_changes_no_digest(path: Path, package: Path, before: dict[str, str]) -> None:
    code = path.read_text(encoding="utf-8")
    more = with_more(code, *functions(code)) + "\n\nADDED = 1\n"
    (package.parent / path.relative_to(ROOT)).write_text(more, encoding="utf-8")
    assert not changed(before)


def imported(path: Path) -> Iterator[str]:
    """What a file imports, anywhere in it: modules, or names of modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_what_counts_uses_of_uncounted_rooms_is_listed_with_a_reason() -> None:
    listed = yaml.safe_load((ROOT / "tests/running/uncounted_imports.yaml").read_text(encoding="utf-8"))
    names = [name for entry in listed for name in entry["names"]]
    used = {
        name.removeprefix(f"{PACKAGE}.")
        for path in COUNTED.values()
        for name in imported(path)
        if name.startswith(f"{PACKAGE}.") and room(name) in UNCOUNTED
    }
    assert sorted(names) == sorted(used), "tests/running/uncounted_imports.yaml is stale"
    assert all(len(entry["reason"].split()) > 4 for entry in listed)


def test_a_file_that_a_module_names_counts_by_its_bytes(package: Path, before: dict[str, str]) -> None:
    style, folder = package / "reporting/planted.css", package / "reporting/planted"
    style.write_text("a { color: red }")
    folder.mkdir()
    (folder / "one.html").write_text("<p>")
    assert not changed(before)  # no module names them
    with (package / "reporting/page.py").open("a", encoding="utf-8") as file:
        file.write('\nSTYLE, PARTS = "planted.css", "planted"\n')
    naming = changed(before)
    assert naming == {stage for stage in STAGES if "reporting.page" in closure(stage)} and naming
    for path, text in ((style, "a { color: blue }"), (folder / "one.html", "<b>"), (folder / "two.html", "")):
        before = digests()
        path.write_text(text)
        assert changed(before) == naming
    before = digests()
    os.utime(style)
    assert not changed(before)


def test_every_data_file_beside_code_that_counts_is_named() -> None:
    folders = {path.parent for path in COUNTED.values()}
    files = {
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    named = {file for path in COUNTED.values() for file in named_files(path)}
    assert {path for path in files if path.suffix != ".py"} == named


def test_only_the_selected_engine_counts(package: Path) -> None:
    engine = package / "rollouts" / "transformers_engine.py"
    shutil.copy(engine, package / "rollouts" / "other_engine.py")
    with (package / "stages" / "generate_rollouts.py").open("a", encoding="utf-8") as file:
        file.write("\n\ndef other():\n    import workflow_scripts.rollouts.other_engine\n")
    for name in ("transformers", "other"):
        found = module_closure(f"{PACKAGE}.stages.generate_rollouts", name)
        assert [module for module in found if module.endswith("_engine")] == [f"{PACKAGE}.rollouts.{name}_engine"]
    before = digests()
    edit(package / "rollouts" / "other_engine.py", "2**63", "2**62")
    assert not changed(before)


def test_a_removed_import_leaves_the_digest(package: Path, before: dict[str, str]) -> None:
    stage = package / "stages" / "generate_rollouts.py"
    edit(stage, "import time\n", "import time\n\nimport workflow_scripts.training.rewards\n")
    assert changed(before) == {"generate_rollouts"}
    after = digests()
    edit(package / "training/rewards.py", "2: 0.5", "2: 0.4")
    assert "generate_rollouts" in changed(after)


# One process for each stage, forked from one that has loaded the slow libraries already.
LOADED = """
import importlib, json, os, sys, traceback
import peft, torch, transformers, trl, pandas, datasets

for stage in sys.argv[1:]:
    if os.fork() == 0:
        try:
            importlib.import_module("workflow_scripts.stages." + stage)
            names = [name for name in sys.modules if name.startswith("workflow_scripts.")]
            print(json.dumps([stage, names]), flush=True)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.wait()
"""


def test_what_a_stage_really_loads_is_in_its_digest() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, *STAGES], capture_output=True, text=True, check=True)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert found.keys() == STAGES.keys(), done.stderr
    for stage, names in found.items():
        loaded = {name for name in names if (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()}
        assert f"{PACKAGE}.stages.{stage}" in loaded
        assert {name for name in loaded if room(name) not in UNCOUNTED} <= CLOSURES[stage, "transformers"].keys(), stage


def test_packages_hold_no_code() -> None:
    # Python runs them whatever module is imported, so nothing that counts may stand there.
    for path in (ROOT / PACKAGE).rglob("__init__.py"):
        (only,) = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(only, ast.Expr)


def test_training_depends_on_one_module_of_scoring() -> None:
    modules = closure("train_grpo")
    assert {name for name in modules if name.startswith("scoring")} == {"scoring.pair_accuracy"}
    assert "training.rewards" in modules and "rollouts.transformers_engine" in modules


def test_scoring_and_tables_depend_on_no_model_code() -> None:
    for stage in ("score_rollouts", "measure_accuracy", "make_tables"):
        assert {name for name in closure(stage) if name.startswith("policy.")} <= {"policy.prompts"}
        assert not any(name.endswith("_engine") for name in closure(stage))


def test_digests_are_asked_of_stages() -> None:
    # Of any other name the digest would be that of no code.
    texts = [path.read_text(encoding="utf-8") for path in (*(ROOT / PACKAGE).rglob("*.py"), *ROOT.glob("rules/*.smk"))]
    asked = {name for text in texts for name in re.findall(r'code_digest\(\s*"([\w.]+)"', text)}
    assert asked and asked <= STAGES.keys()


def test_imports_are_written_so_that_the_digest_sees_them() -> None:
    for path in (ROOT / PACKAGE).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path
            assert not (isinstance(node, ast.Attribute) and node.attr == "import_module"), path
