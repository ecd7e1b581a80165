"""Command lines of the stages: what is refused, which files are inputs and outputs, and what holds for all of them."""

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic_settings import CliPositionalArg

from workflow_scripts.configuration import stages
from workflow_scripts.configuration.model import Configuration, Section
from workflow_scripts.configuration.stages import SelectSubset
from workflow_scripts.files.paths import ROOT
from workflow_scripts.running.code_digest import module_closure
from workflow_scripts.running.command_line import Input, Output, StageArguments

STAGES = sorted(
    path.stem
    for path in (ROOT / "workflow_scripts" / "stages").glob("*.py")
    if "class Arguments(StageArguments)" in path.read_text(encoding="utf-8")
)


class Size(Section):
    """How much."""

    width: int
    unit: Literal["pixel", "inch"] = "pixel"


class Example(StageArguments):
    """Do what is needed for a test."""

    parts: CliPositionalArg[list[Input]]
    """What comes in."""
    more: list[Input] | None = None
    """What else comes in."""
    hint: Input | None = None
    """What may come in."""
    main: Output
    """What comes out first."""
    second: Output
    """What comes out second."""
    folder: Path
    """Neither input nor output."""
    config: Size
    """How much of it."""


WORDS = ["a", "b", "--main", "m", "--second", "s", "--folder", "f", "--config", '{"width": 3}']


def test_words_become_typed_arguments() -> None:
    arguments = Example.parse(WORDS)
    assert arguments.parts == [Path("a"), Path("b")]
    assert (arguments.hint, arguments.more, arguments.log_file, arguments.code_digest) == (None, None, None, None)
    assert arguments.config == Size(width=3)


def test_files_are_known_by_their_role() -> None:
    arguments = Example.parse(WORDS)
    assert arguments.files("input") == {"parts": [Path("a"), Path("b")]}
    assert list(arguments.files("output").items()) == [("main", [Path("m")]), ("second", [Path("s")])]
    more = Example.parse([*WORDS, "--hint", "h", "--more", "x", "--more", "y"])
    expected = {"parts": [Path("a"), Path("b")], "more": [Path("x"), Path("y")], "hint": [Path("h")]}
    assert more.files("input") == expected
    # As rules write them: all values behind one option, and an option without a file.
    assert Example.parse([*WORDS, "--hint", "h", "--more", "x", "y"]).files("input") == expected
    assert Example.parse([*WORDS, "--hint", "--more"]).files("input") == arguments.files("input")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: PARTS"),
        (["a"], "--main: Field required"),
        ([*WORDS, "--outptu", "x"], "unrecognized arguments: --outptu x"),
        ([*WORDS, "--outptu"], "unrecognized arguments: --outptu"),
        ([*WORDS[:-1], '{"width": "wide"}'], "--config.width: Input should be a valid integer"),
        ([*WORDS[:-1], '{"width": 1, "unit": "inhc"}'], "--config.unit: Input should be 'pixel' or 'inch'"),
        ([*WORDS[:-1], '{"width": 1, "depth": 2}'], "--config.depth: Extra inputs are not permitted"),
        ([*WORDS[:-1], "{}"], "--config.width: Field required"),
        ([*WORDS[:-1], '{"width"'], 'error parsing value for field "config"'),
    ],
)
def test_wrong_words_end_with_a_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        Example.parse(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_variables_of_the_environment_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HINT", "hint", "CODE_DIGEST", "LOG_FILE", "CONFIG"):
        monkeypatch.setenv(name, '{"width": 9}')
    arguments = Example.parse(WORDS)
    assert arguments.hint is None and arguments.code_digest is None and arguments.config.width == 3


# --------------------------------------------------------------------------------------------------------- every stage


def arguments_of(stage: str) -> type[StageArguments]:
    """Arguments class of a stage."""
    return importlib.import_module(f"workflow_scripts.stages.{stage}").Arguments


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_explains_itself(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        arguments_of(stage).parse(["--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for name, field in arguments_of(stage).model_fields.items():
        assert name in said.lower() and field.description, name
        assert " ".join(field.description.split())[:30] in said
    example = said[said.index("example: ") :].removeprefix("example: ").split("The workflow passes")[0]
    assert example.startswith(f"python -m workflow_scripts.stages.{stage} ")
    options = re.findall(r" --([a-z_0-9]+)", example.split(" torchrun ")[0])
    assert "config" in options and set(options) <= set(arguments_of(stage).model_fields)
    assert f"usage: python -m workflow_scripts.stages.{stage} [-h]" in said and "(default: null)" in said
    assert "docs/configuration.md" in said and "Exit status: 0 done" in said


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_outputs_and_a_configuration_of_its_own(stage: str) -> None:
    fields = arguments_of(stage).model_fields
    assert issubclass(fields["config"].annotation, stages.StageConfig)  # type: ignore[arg-type]
    assert fields["config"].annotation.__name__ == "".join(word.capitalize() for word in stage.split("_"))
    assert any("output" in repr((field.annotation, field.metadata)) for field in fields.values())


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        ("train_grpo", stages.TrainGrpo.of(Configuration(), "imagereward", 2)),
        ("train_grpo", stages.TrainGrpo.of(Configuration(), "hpsv2", 2)),
        ("generate_rollouts", stages.GenerateRollouts.of(Configuration(), "hpsv2", "grpo", "imagereward", 1, 2, 3)),
        ("synthesize_dataset", stages.SynthesizeDataset.of(Configuration(), "imagereward")),
        ("synthesize_dataset", stages.SynthesizeDataset.of(Configuration(), "hpsv2")),
        ("download_dataset", stages.DownloadDataset.of(Configuration(), "imagereward")),
        ("download_dataset", stages.DownloadDataset.of(Configuration(), "hpsv2")),
        ("select_subset", stages.SelectSubset.of(Configuration(), "hpsv2", "train")),
        ("read_images", stages.ReadImages.of(Configuration(), "hpsv2", "train", 0)),
        ("prepare_base_policy", stages.PrepareBasePolicy.of(Configuration())),
        ("cold_start_policy", stages.ColdStartPolicy.of(Configuration())),
        ("make_gallery", stages.MakeGallery.of(Configuration(), "hpsv2", "grpo", "imagereward", 1)),
        ("make_tables", stages.MakeTables.of(Configuration())),
        ("make_figures", stages.MakeFigures.of(Configuration())),
        ("make_report", stages.MakeReport.of(Configuration())),
    ],
)
def test_the_rule_s_text_arrives_unchanged(stage: str, config: Any) -> None:
    cls = arguments_of(stage)
    words = ["--config", config.canonical()]
    for name, field in cls.model_fields.items():
        if {"input", "output"} & set(field.metadata) or name == "checkpoints":
            words += [f"--{name}", name]
    if stage == "make_tables":
        words = ["--accuracies", "accuracy.json", "--adapters", "adapter", *words]
    if stage == "make_gallery":
        words = ["--rollouts", "rollouts.parquet", "--images", "images", *words]
    if stage == "make_figures":
        lists = [word for name in ("scores", "subsets", "adapters", "figures") for word in (f"--{name}", name)]
        words = ["--rollouts", "rollouts.parquet", *lists, *words]
    if stage == "make_report":
        words = ["--galleries", "gallery.parquet", *words]
    arrived = cls.parse(words).config  # type: ignore[attr-defined]
    assert arrived == config and type(arrived) is type(config)
    assert arrived.canonical() == config.canonical()


# ------------------------------------------------------------------------------------------------------------- errors

INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what nohup starts
from workflow_scripts.stages.select_subset import Arguments
from workflow_scripts.tracking.stage_run import run_stage

with run_stage(Arguments.parse()):
    print("running", flush=True)
    sys.stdin.read()
"""


def started(words: list[str], folder: Path) -> subprocess.Popen[str]:
    """A process of a stage, without tracking."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, **pipes)


SUBSET = ["--subset", "subset.parquet", "--config", SelectSubset.of(Configuration(), "imagereward", "test").canonical()]


@pytest.mark.parametrize(
    ("words", "status", "last"),
    [
        (["--help"], 0, ""),
        ([*SUBSET, "--preferences", "nothing.parquet"], 1, "error: nothing.parquet has no readable provenance file"),
        ([*SUBSET, "--preferencse", "nothing.parquet"], 2, "unrecognized arguments: --preferencse nothing.parquet"),
        (SUBSET, 2, "--preferences: Field required"),
    ],
)
def test_exit_status(words: list[str], status: int, last: str, tmp_path: Path) -> None:
    process = started(["-m", "workflow_scripts.stages.select_subset", *words], tmp_path)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == status, said
    assert last in (said.splitlines() or [""])[-1] and "Traceback" not in said


def test_ctrl_c_is_said_in_one_line(tmp_path: Path, with_sidecar: Any) -> None:
    (tmp_path / "preferences.parquet").write_text("never read")
    with_sidecar(tmp_path / "preferences.parquet")
    process = started(["-c", INTERRUPTED, *SUBSET, "--preferences", "preferences.parquet"], tmp_path)
    assert process.stdout and process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT, said  # a shell says 130
    assert said.splitlines()[-1] == "interrupted; run the same command again to go on" and "Traceback" not in said


def raised(tree: ast.AST) -> Iterator[str]:
    """Names of the classes that a module raises; a function that makes an error is checked where it says `-> Error`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func).split(".")[-1]
            made = [
                n.returns for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name and n.returns
            ]
            yield ast.unparse(made[0]) if made else name


def test_what_a_stage_raises_is_an_error_of_the_project() -> None:
    """Only those are said in one line, without a traceback."""
    own = {
        node.name
        for path in (ROOT / "workflow_scripts").rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }
    assert len(own) > 8
    paths = {
        path for stage in STAGES for path in module_closure(f"workflow_scripts.stages.{stage}", "transformers").values()
    }
    others = {
        path.name: names for path in paths if (names := set(raised(ast.parse(path.read_text(encoding="utf-8")))) - own)
    }
    assert others == {"hpdv2.py": {"ValueError"}}  # of a parser, which its caller turns into a SchemaError
