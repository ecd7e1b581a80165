"""Sidecars: the identity of a stage instance, and files that are still what a stage wrote."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workflow_scripts.files.records import ProvenanceError
from workflow_scripts.running.provenance import read_sidecar, sidecar_path, stage_key, verify


def test_stage_key_depends_on_each_part() -> None:
    parts: list[Any] = ["stage", {"seed": 0}, {"base": ["d"]}, "code"]
    others: list[Any] = ["other", {"seed": 1}, {"base": ["e"]}, "edoc"]
    keys = {stage_key(*parts), *(stage_key(*parts[:i], others[i], *parts[i + 1 :]) for i in range(4))}
    assert len(keys) == 5 and stage_key(*parts) in keys


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
