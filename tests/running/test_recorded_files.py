"""Files of a data set or a base policy that changed after they were recorded are found by their content."""

import json
from pathlib import Path

import pytest

from workflow_scripts.files.digests import file_digest
from workflow_scripts.files.records import file_record
from workflow_scripts.running.recorded_files import altered_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of two files."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture(params=["manifest", "dataset"])
def record(request: pytest.FixtureRequest, folder: Path) -> Path:
    """Return a record of these files, as of a base policy or a data set."""
    path = folder.parent / f"{request.param}.json"
    if request.param == "manifest":
        path.write_text(json.dumps({"path": str(folder), "files": {n: file_digest(folder / n) for n in ("a", "b")}}))
    else:
        path.write_text(json.dumps({"folder": "files", "files": {n: file_record(folder / n) for n in ("a", "b")}}))
    return path


def test_touched_files_are_as_recorded(record: Path, folder: Path) -> None:
    (folder / "a").touch()
    (folder / "not recorded").write_text("c")
    assert altered_files(record) == []


def test_changed_and_missing_files_are_named(record: Path, folder: Path) -> None:
    (folder / "a").write_text("A")
    (folder / "b").unlink()
    assert altered_files(record) == [
        f"{folder / 'a'}, which it names, has changed since",
        f"{folder / 'b'}, which it names, is missing",
    ]
