"""The command that ranks images: its arguments, what it prints and writes, its exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from workflow_scripts.__main__ import main
from workflow_scripts.files.paths import ROOT

Scenes = list[tuple[str, dict[str, Image.Image]]]


def test_the_command_prints_and_writes(
    policy_folders: Path, scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "policies").symlink_to(policy_folders)
    monkeypatch.chdir(tmp_path)
    prompt, pictures = scenes[0]
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    files = sorted(str(path) for path in tmp_path.glob("*.png"))
    with pytest.raises(RuntimeError, match="there are 2 policies; choose one: --policy results/policies/"):
        main(["rank", "--prompt", prompt, *files])
    main(["rank", "--prompt", prompt, *files, "--policy", "results/policies/imagereward/seed0", "-k", "1"])
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "ranking.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4] and sorted(row["path"] for row in rows) == files
    assert prompt in said and all(f"{row['score']:.3f}" in said for row in rows)
    assert "images: 4, prompts: 1; written: ranking.csv, ranking.jsonl, ranking.html" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], 'give --prompt "…" with images'),
        (["--prompt", "red"], 'give --prompt "…" with images'),
        (["--table", "t.csv", "--prompt", "red"], "leave out --prompt and images"),
        (["--table", "t.csv", "-k", "0"], "--k: Input should be greater than or equal to 1"),
        (["--table", "t.csv", "--kk", "1"], "unrecognized arguments: --kk"),
    ],
)
def test_wrong_words_end_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["rank", *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_nothing_to_rank_ends_with_1_and_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "workflow_scripts", "rank", "--prompt", "red", "no.png"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    expected = "error: no.png is not there; name image files or folders of images\n"
    assert (done.returncode, done.stderr) == (1, expected)
