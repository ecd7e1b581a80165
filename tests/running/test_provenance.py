"""Code digests, sidecars and atomic files."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.files.digests import canonical_json
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.records import ProvenanceError, check_file, checked_raw_file, file_record
from workflow_scripts.files.writing import replacing, write_json
from workflow_scripts.running import provenance
from workflow_scripts.running.code_digest import WITHOUT_EFFECT, code_digest, module_closure
from workflow_scripts.running.provenance import read_sidecar, sidecar_path, stage_key, verify

PACKAGE = ROOT / "workflow_scripts"
STAGES = sorted(
    path.stem for path in PACKAGE.glob("*.py") if "class Arguments(StageArguments)" in path.read_text(encoding="utf-8")
)
SUB_PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def short(closure: dict[str, Path]) -> set[str]:
    """Names of the modules of a closure, without the package's."""
    return {name.removeprefix("workflow_scripts.") for name in closure}


# ------------------------------------------------------------------------------------------------------------ the code


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the package that digests are taken of."""
    copy = tmp_path / "workflow_scripts"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return copy


def digests() -> dict[str, str]:
    """Digest of every stage, of the code as it is now."""
    code_digest.cache_clear()
    try:
        return {stage: code_digest(stage, "transformers") for stage in STAGES}
    finally:
        code_digest.cache_clear()


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that must be there."""
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path} no longer contains {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_stages_differ(package: Path) -> None:
    assert len(STAGES) > 8 and len(set(digests().values())) == len(STAGES)


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


def test_a_reformat_changes_no_digest(package: Path) -> None:
    before = digests()
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "__future__" not in text:
            path.write_text(reformat(text), encoding="utf-8")
    edit(package / "rewards.py", "# a comment", "# another comment\n\n\n\n")
    assert digests() == before


@pytest.mark.parametrize("length", [40, 80, 320])
def test_another_line_length_changes_no_digest(package: Path, length: int) -> None:
    before = digests()
    texts = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    style = ["--isolated", "--line-length", str(length), "--config", "format.quote-style='single'"]
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", *style, str(package)], check=True)
    changed = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    assert len(changed) > 30 and digests() == before


def test_a_touch_changes_no_digest(package: Path) -> None:
    before = digests()
    for path in package.rglob("*.py"):
        os.utime(path)
    assert digests() == before


@pytest.mark.parametrize(
    ("module", "old", "new", "stages"),
    [
        ("rewards.py", "2: 0.5", "2: 0.4", {"train_grpo"}),
        ("train_grpo.py", "% 2:", "% 3:", {"train_grpo"}),
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
    package: Path, module: str, old: str, new: str, stages: set[str]
) -> None:
    before = digests()
    edit(package / module, old, new)
    after = digests()
    changed = {stage for stage in STAGES if before[stage] != after[stage]}
    assert stages <= changed
    # Whoever else changed imports the module, too.
    name = module.removesuffix(".py").replace("/", ".")
    assert all(name in short(module_closure(f"workflow_scripts.{stage}", "transformers")) for stage in changed)


def test_what_is_left_out_of_the_digest_is_this_list() -> None:
    bookkeeping = {"locks", "log_runs", "provenance", "redaction", "tracking"}
    bookkeeping |= {"mlflow_pages", "progress", "summary", "traces"}  # only tell people
    settings = {"command_line", "configuration", "published", "stage_configuration"}
    assert set(WITHOUT_EFFECT) == settings | bookkeeping


@pytest.mark.parametrize("module", WITHOUT_EFFECT)
def test_modules_without_effect_change_no_digest(package: Path, module: str) -> None:
    before = digests()
    path = package / f"{module}.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n\nSOMETHING_NEW = 1\n", encoding="utf-8")
    assert digests() == before


def test_only_the_selected_engine_counts(package: Path) -> None:
    engine = package / "rollouts" / "transformers_engine.py"
    shutil.copy(engine, package / "rollouts" / "other_engine.py")
    stage = package / "generate_rollouts.py"
    text = stage.read_text(encoding="utf-8")
    stage.write_text(text + "\n\ndef other():\n    import workflow_scripts.rollouts.other_engine\n", encoding="utf-8")
    closure = {
        e: short(module_closure("workflow_scripts.stages.generate_rollouts", e)) for e in ("transformers", "other")
    }
    engines = {e: {name for name in closure[e] if name.endswith("_engine")} for e in closure}
    assert engines == {"transformers": {"rollouts.transformers_engine"}, "other": {"rollouts.other_engine"}}
    before = digests()
    edit(package / "rollouts" / "other_engine.py", "2**63", "2**62")
    assert digests() == before


def test_a_removed_import_leaves_the_digest(package: Path) -> None:
    before = digests()
    edit(package / "generate_rollouts.py", "import time\n", "import time\n\nimport workflow_scripts.training.rewards\n")
    after = digests()
    assert [stage for stage in STAGES if before[stage] != after[stage]] == ["generate_rollouts"]
    edit(package / "rewards.py", "2: 0.5", "2: 0.4")
    assert digests()["generate_rollouts"] != after["generate_rollouts"]


# One process for each stage, forked from one that has loaded the slow libraries already.
LOADED = """
import importlib, json, os, sys, traceback
import peft, torch, transformers, trl, pandas, datasets

for stage in sys.argv[1:]:
    if os.fork() == 0:
        try:
            importlib.import_module("workflow_scripts." + stage)
            names = [name for name in sys.modules if name.startswith("workflow_scripts.")]
            print(json.dumps([stage, names]), flush=True)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.wait()
"""


def test_what_a_stage_really_loads_is_in_its_digest() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, *STAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert sorted(found) == STAGES, done.stderr
    for stage, names in found.items():
        loaded = {name.removeprefix("workflow_scripts.") for name in names}
        known = short(module_closure(f"workflow_scripts.{stage}", "transformers"))
        assert stage in loaded
        assert loaded <= known | set(WITHOUT_EFFECT) | set(SUB_PACKAGES), stage


def test_packages_hold_no_code() -> None:
    # Python runs them whatever module is imported, so nothing that counts may stand there.
    for path in PACKAGE.rglob("__init__.py"):
        (only,) = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(only, ast.Expr)


def test_training_depends_on_one_module_of_scoring() -> None:
    closure = short(module_closure("workflow_scripts.stages.train_grpo", "transformers"))
    assert {name for name in closure if name.startswith("scoring")} == {"scoring.pair_accuracy"}
    assert "rewards" in closure and "rollouts.transformers_engine" in closure


def test_scoring_and_tables_depend_on_no_model_code() -> None:
    for stage in ("score_rollouts", "measure_accuracy", "make_tables"):
        closure = short(module_closure(f"workflow_scripts.{stage}"))
        assert {name for name in closure if name.startswith("policy.")} <= {"policy.prompts"}
        assert not any(name.endswith("_engine") for name in closure)


def test_scoring_and_rewards_load_no_model_library() -> None:
    modules = ["rewards", *(f"scoring.{path.stem}" for path in (PACKAGE / "scoring").glob("*.py"))]
    code = f"import importlib, sys; [importlib.import_module('workflow_scripts.' + name) for name in {modules}];"
    code += "print([n for n in ('torch', 'transformers', 'peft', 'trl', 'mlflow', 'snakemake') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_sub_packages_import_no_stage_no_tracking_and_no_snakemake() -> None:
    forbidden = [f"workflow_scripts.{name}" for name in (*STAGES, "tracking", "command_line")] + ["snakemake", "mlflow"]
    for package in SUB_PACKAGES:
        for path in (PACKAGE / package).glob("*.py"):
            for name in imported(path):
                assert not any(name == word or name.startswith(f"{word}.") for word in forbidden), (path, name)


@pytest.mark.parametrize(
    ("package", "others"),
    [
        ("preferences", {"policy", "rollouts", "scoring"}),
        ("policy", {"rollouts", "scoring"}),
        ("rollouts", {"scoring"}),
        ("scoring", {"policy", "rollouts"}),
    ],
)
def test_packages_depend_in_one_direction(package: str, others: set[str]) -> None:
    for path in (PACKAGE / package).glob("*.py"):
        for name in imported(path):
            assert name.removeprefix("workflow_scripts.").split(".")[0] not in others, (path, name)


def test_imports_are_written_so_that_the_digest_sees_them() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path
            assert not (isinstance(node, ast.Attribute) and node.attr == "import_module"), path


# ----------------------------------------------------------------------------------------------------- canonical JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def reordered(value: Any) -> Any:
    """The same value with the keys of every object in the opposite order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@settings(deadline=None)
@given(JSON)
def test_canonical_json_does_not_depend_on_order(value: Any) -> None:
    text = canonical_json(value)
    assert canonical_json(reordered(value)) == text
    assert json.loads(text) == value and "\n" not in text


def test_canonical_json_tells_values_apart() -> None:
    texts = [canonical_json(value) for value in (1, "1", 1.5, True, None, [1], {"a": 1}, {"a": [1]}, {"a": {"b": 1}})]
    assert len(set(texts)) == len(texts)
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_stage_key_depends_on_each_part() -> None:
    parts: list[Any] = ["stage", {"seed": 0}, {"base": ["d"]}, "code"]
    others: list[Any] = ["other", {"seed": 1}, {"base": ["e"]}, "edoc"]
    keys = {stage_key(*parts), *(stage_key(*parts[:i], others[i], *parts[i + 1 :]) for i in range(4))}
    assert len(keys) == 5 and stage_key(*parts) in keys


# ----------------------------------------------------------------------------------------------------------- the files


@pytest.fixture
def output(tmp_path: Path, with_sidecar: Callable[..., Path]) -> Path:
    """Output of two files with its sidecar."""
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")
    return with_sidecar(tmp_path / "a.txt", tmp_path / "b.txt", inputs={})


def test_what_a_stage_wrote_is_verified(output: Path) -> None:
    assert set(verify(output)["outputs"]) == {"a.txt", "b.txt"}


@pytest.mark.parametrize("name", ["a.txt", "b.txt"])
@pytest.mark.parametrize("text", ["FIRST.", "second and more", ""])
def test_an_edited_file_is_named(output: Path, name: str, text: str) -> None:
    (output.parent / name).write_text(text)
    with pytest.raises(ProvenanceError, match=rf"/{name} is not what its stage wrote .*a\.txt\.provenance\.json"):
        verify(output)


def test_an_edit_of_the_same_size_is_noticed(output: Path) -> None:
    output.write_text("worst")
    with pytest.raises(ProvenanceError, match=r"a\.txt is not what its stage wrote"):
        verify(output)


def test_a_missing_file_is_named(output: Path) -> None:
    (output.parent / "b.txt").unlink()
    with pytest.raises(ProvenanceError, match=r"/b\.txt is missing .*run snakemake again"):
        verify(output)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text('{"outputs": ')])
def test_a_missing_or_broken_sidecar_is_named(output: Path, damage: Callable[[Path], Any]) -> None:
    damage(sidecar_path(output))
    for read in (verify, read_sidecar):
        with pytest.raises(ProvenanceError, match=r"a\.txt has no readable provenance file .*a\.txt\.provenance\.json"):
            read(output)


def test_a_touch_is_no_edit(output: Path) -> None:
    before = verify(output)
    for path in output.parent.iterdir():
        os.utime(path, (1, 1))
    assert verify(output) == before


def test_an_untouched_file_is_not_read_again(output: Path) -> None:
    record = file_record(output)
    times = output.stat()
    output.write_text("worst")
    os.utime(output, ns=(times.st_atime_ns, times.st_mtime_ns))
    # Size and time as recorded are taken for the content as recorded.
    assert check_file(output, record, sidecar_path(output)) == record["sha256"]


@pytest.mark.parametrize(("folder", "advice"), [("f00d", "delete both"), ("../mine", "restore it, or delete")])
def test_a_file_of_the_user_is_not_to_be_deleted(tmp_path: Path, folder: str, advice: str) -> None:
    dataset = tmp_path / "downloads" / "dataset.json"
    raw = dataset.parent / folder / "train.json"
    raw.parent.mkdir(parents=True)
    raw.write_text("as recorded")
    record = {"folder": folder, "files": {"train.json": file_record(raw)}}
    assert checked_raw_file("train.json", record, dataset).samefile(raw)
    raw.write_text("as it is now")
    with pytest.raises(ProvenanceError, match=rf"train\.json is not .*{advice}"):
        checked_raw_file("train.json", record, dataset)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    for old in (None, "old"):
        if old:
            (tmp_path / "result").write_text(old)
        with pytest.raises(RuntimeError, match="stop"), replacing(tmp_path / "result") as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")
        assert [path.name for path in tmp_path.iterdir()] == (["result"] if old else [])
    assert (tmp_path / "result").read_text() == "old"


def test_a_write_that_ended_replaces_file_or_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result"
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "part").write_text("1")
        assert not path.exists()
    assert (path / "part").read_text() == "1"
    with replacing(path) as temporary:
        temporary.write_text("2")
    assert path.read_text() == "2" and [p.name for p in path.parent.iterdir()] == ["result"]


def test_json_files_have_the_same_bytes_for_the_same_value(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"x": 1, "ü": [1.5, None]})
    write_json(tmp_path / "b", {"ü": [1.5, None], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a", float("inf"))
    assert json.loads((tmp_path / "a").read_text()) == {"x": 1, "ü": [1.5, None]}
