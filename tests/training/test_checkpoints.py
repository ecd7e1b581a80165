"""From which checkpoint a training resumes."""

from pathlib import Path

from workflow_scripts.training.checkpoints import last_complete_checkpoint


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    for step, state in ((2, "{}"), (4, '{"global_step": 4}'), (10, '{"global_'), (12, ""), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
