"""Checkpoints of a training, from which it resumes after a kill."""

import json
import zipfile
from pathlib import Path

STATE = "trainer_state.json"  # the file of a checkpoint that is written last


def step_of(checkpoint: Path) -> int:
    """Step after which a checkpoint was saved."""
    return int(checkpoint.name.split("-")[1])


def last_complete_checkpoint(folder: Path, processes: int = 1) -> Path | None:
    """The newest checkpoint with a readable trainer state, or None.

    With several processes, each writes its own random state, possibly after the trainer state. These files are zip
    archives, which are readable only if they are whole.
    """
    complete = []
    for state in folder.glob(f"checkpoint-*/{STATE}"):
        try:
            json.loads(state.read_text())
        except ValueError:
            continue
        random_states = [state.with_name(f"rng_state_{rank}.pth") for rank in range(processes)]
        if processes == 1 or all(path.is_file() and zipfile.is_zipfile(path) for path in random_states):
            complete.append(state.parent)
    return max(complete, key=step_of, default=None)
