"""Files are written whole or not at all, the same bytes for the same value."""

import json
from pathlib import Path

import pytest

from workflow_scripts.files.writing import replacing, write_json


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
