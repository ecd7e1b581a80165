"""The command that checks a results folder, where it cannot; what it finds in one is in workflow/test_mismatches.py."""

import re
import sys
from pathlib import Path

import pytest

from workflow_scripts.verify_results import main


@pytest.mark.parametrize(
    ("overlay", "told"),
    [
        (None, r"No such file or directory: '.*mine\.yaml'"),
        ("scoring: {report: [1]}", r"scoring\.report: unknown key; did you mean report_k\?"),
        ("scoring: {report_k: [1}", r'mine\.yaml", line 1, column 23'),
        ("", "holds no provenance files; is it a results folder"),
    ],
    ids=["missing", "unknown key", "no YAML", "empty"],
)
def test_what_cannot_be_checked_is_said(
    overlay: str | None,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "mine.yaml"
    if overlay is not None:
        path.write_text(overlay)
    monkeypatch.setattr(sys, "argv", ["verify_results", str(tmp_path), "--configfile", str(path)])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(told, said), said
