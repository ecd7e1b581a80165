"""Which folders the command checks; what it finds in one is in workflow/test_mismatches.py."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workflow_scripts.__main__ import main
from workflow_scripts.commands.log_runs import recorded
from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import SelectSubset
from workflow_scripts.preferences.schema import PREFERENCES, write_preferences


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
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(tmp_path), "--configfile", str(path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(told, said), said


def test_a_results_folder_in_another_is_left_out(
    run_main: Any,
    with_sidecar: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """results/mine of other settings does not misfit in results, is not logged with it and is never removed for it."""
    preferences = tmp_path / "preferences.parquet"
    row = dict.fromkeys(PREFERENCES.names) | {"image_ids": ["a", "b"], "archives": ["z", "z"], "ranks": [1, 2]}
    write_preferences(preferences, [row | {"prompt_id": f"p{i}", "prompt": f"prompt {i}"} for i in range(3)])
    with_sidecar(preferences)
    config = SelectSubset.of(Configuration(), "imagereward", "test")
    results = tmp_path / "elsewhere" / "results"
    outputs = {results: config, results / "mine": config.model_copy(update={"seed": 1})}
    for folder, asked in outputs.items():
        run_main("select_subset", asked, preferences=preferences, subset=folder / "datasets/subset.parquet")
        (folder / "logs").mkdir()

    def misfits(folder: Path) -> str:
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(f"results: {folder}\n")
        words = ["verify", str(folder), "--remove"]
        with pytest.raises(SystemExit):
            main(words)
        assert "is not the results folder of this configuration, results; name its overlays" in capsys.readouterr().err
        with pytest.raises(SystemExit) as stop:
            main([*words, "--configfile", str(overlay)])
        code, said = stop.value.code, capsys.readouterr().out
        assert (code == 1) == ("seed = 1" in said) == ("do not fit." in said)
        return said

    assert [output.parent.parent for output, _ in recorded([results])[0]] == [results]
    assert "seed = 1" not in misfits(results) and (results / "mine/datasets/subset.parquet").exists()
    assert "seed = 1" in misfits(results / "mine")
