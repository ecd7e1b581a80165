"""Training in two processes over gloo: a world of two, DDP in effect, the update of one process; refusals."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import torch

from workflow_scripts.configuration.jobs import gpus, launcher
from workflow_scripts.configuration.model import ConfigurationError, load
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.files.paths import ROOT
from workflow_scripts.policy.prompts import RATINGS
from workflow_scripts.running.locks import Lock
from workflow_scripts.running.provenance import verify
from workflow_scripts.training.checkpoints import last_complete_checkpoint
from workflow_scripts.training.settings import distributed_settings, grpo_config

TWO = {"distributed": {"processes": 2}}
SMALL = {"prompts_per_step": 2, "group_size": 4, "validate_every": 2, "warmup_steps": 0}


def started(command: list[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    """Start a command with this interpreter's programs first, as a workflow's job."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def stage(
    inputs: dict[str, Path], folder: Path, raw: dict[str, Any], launched: bool = True, steps: int = 2
) -> list[str]:
    """Command line of the stage as its rule has it."""
    folder.mkdir(exist_ok=True)
    c = load({"training": {"imagereward": SMALL | {"steps": steps}}} | raw)
    files = inputs | {"adapter": folder / "adapter_model.safetensors", "adapter_config": folder / "adapter_config.json"}
    files |= {"record": folder / "training.json", "checkpoints": folder / "checkpoints"}
    start = shlex.split(launcher(c, "train_grpo")) if launched else ["python"]
    command = [
        *start,
        "-m",
        "workflow_scripts.stages.train_grpo",
        "--config",
        TrainGrpo.of(c, "imagereward", 0).canonical(),
    ]
    return command + [word for name, path in files.items() for word in (f"--{name}", str(path))]


def ended(process: subprocess.Popen[str], code: int | None = 0) -> str:
    """What a process has said at its end, by itself and with this exit code (None: any but 0)."""
    said = process.communicate(timeout=600)[1]
    assert process.returncode == code if code is not None else process.returncode, said
    return said


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


# ---------------------------------------------------------------------------------------------------------- the update


def first_update(
    manifest: Path, folder: Path, processes: int, strategy: str = "ddp", passes: str = "plain"
) -> subprocess.Popen[str]:
    start = shlex.split(launcher(load({"distributed": {"processes": processes}}), "train_grpo"))
    script = Path(__file__).with_name("first_update.py")
    return started([*start, str(script), str(manifest), str(folder), str(processes), strategy, passes], folder)


def test_two_processes_make_the_first_update_of_one(base_manifest: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        ended(first_update(base_manifest, tmp_path, processes))
    one, two, other = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert [(run["world_size"], run["wrapper"]) for run in (one, two, other)] == [
        (1, "PeftModelForCausalLM"),
        (2, "DistributedDataParallel"),
        (2, "DistributedDataParallel"),
    ]
    # Both ranks go on with one adapter, to the bit, and began with that of the single process.
    assert all(torch.equal(two["after"][name], other["after"][name]) for name in two["after"])
    assert torch.equal(flat(one["before"]), flat(two["before"]))
    assert one["reward"] == pytest.approx(two["reward"], rel=1e-6)  # of the whole batch, not of a rank's half
    # Float32 sums in another order: 5e-7 of the gradient when this was written. Adam's first step is nearly the sign of
    # the gradient, so that of its smallest entries is less exact: 4e-5 of the update.
    gradient = flat(one["gradients"])
    assert gradient.norm() > 0.1
    assert (flat(two["gradients"]) - gradient).norm() < 1e-5 * gradient.norm()
    update = flat(one["after"]) - flat(one["before"])
    assert (flat(two["after"]) - flat(two["before"]) - update).norm() < 1e-3 * update.norm()
    assert update.abs().max() == pytest.approx(1e-3, rel=1e-3)  # the learning rate


@pytest.mark.parametrize("processes", [1, 2])
def test_shared_prompts_make_trls_first_update(base_manifest: Path, tmp_path: Path, processes: int) -> None:
    found = {}
    for passes in ("plain", "shared"):
        folder = tmp_path / passes
        folder.mkdir()
        ended(first_update(base_manifest, folder, processes, passes=passes))
        found[passes] = torch.load(folder / f"{processes}-0.pt")
    plain, shared = found["plain"], found["shared"]
    assert torch.equal(flat(plain["before"]), flat(shared["before"])) and plain["reward"] == shared["reward"]
    gradient = flat(plain["gradients"])
    assert gradient.norm() > 0.1
    # 1.1e-5 on a processor with AVX-512, below 1e-5 on one with AVX2.
    assert (flat(shared["gradients"]) - gradient).norm() < 3e-5 * gradient.norm()
    update = flat(plain["after"]) - flat(plain["before"])
    assert (flat(shared["after"]) - flat(shared["before"]) - update).norm() < 1e-3 * update.norm()


# ----------------------------------------------------------------------------------------------------------- the stage


def test_the_stage_in_two_processes(training_inputs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    said = ended(started(stage(training_inputs, folder, TWO), folder, MLFLOW_TRACKING_URI=uri))

    (run,) = mlflow.MlflowClient(uri).search_runs(["1"])
    sidecar = verify(folder / "adapter_model.safetensors")
    assert (run.info.status, run.info.run_id) == ("FINISHED", sidecar["mlflow_run_id"])
    assert sidecar["config"]["distributed"] == {"processes": 2, "strategy": "ddp"}
    assert said.count("stage_key") == 1 and said.count("finished in") == 1
    assert list(folder.glob(".*.lock")) == []
    assert [path for path in (folder / "checkpoints").glob("*") if path.is_dir()] == []
    history = json.loads((folder / "training.json").read_text())["history"]
    assert [entry["step"] for entry in history if "reward" in entry] == [1, 2]
    validations = [entry for entry in history if "eval_soft_pair_accuracy" in entry]
    assert [entry["step"] for entry in validations] == [0, 2]
    # Shares of all validation items, each process having answered for a part: of half of them all would be even.
    items = sidecar["metrics"]["validation_items"]
    counts = [items * validations[0][f"eval_answer_share/{answer}"] for answer in (*RATINGS, None)]
    assert counts == pytest.approx([round(count) for count in counts])
    assert sum(counts) == pytest.approx(items) and any(round(count) % 2 for count in counts)


@pytest.mark.slow
def test_two_killed_processes_go_on_to_the_same_adapter(training_inputs: dict[str, Path], tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    ended(started(stage(training_inputs, undisturbed, TWO, steps=6), undisturbed))
    process = started(stage(training_inputs, killed, TWO, steps=6), killed)
    while not any(last_complete_checkpoint(path, 2) for path in killed.glob("checkpoints/*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        each.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "adapter_model.safetensors").exists()
    ended(started(stage(training_inputs, killed, TWO, steps=6), killed))
    for name in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert verify(killed / "adapter_model.safetensors")["metrics"]["resumed_from_step"] in (2, 4)


def test_a_checkpoint_has_the_random_state_of_every_process(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    torch.save({"cpu": torch.random.get_rng_state()}, checkpoint / "rng_state_0.pth")
    assert last_complete_checkpoint(tmp_path, 2) is None
    whole = (checkpoint / "rng_state_0.pth").read_bytes()
    (checkpoint / "rng_state_1.pth").write_bytes(whole[: len(whole) // 2])
    assert last_complete_checkpoint(tmp_path, 2) is None
    shutil.copyfile(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    assert last_complete_checkpoint(tmp_path, 2) == checkpoint
    assert last_complete_checkpoint(tmp_path, 3) is None


# ------------------------------------------------------------------------------------------------------------ refusals


def test_one_process_is_not_taken_for_two(training_inputs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = ended(started(stage(training_inputs, folder, TWO, launched=False), folder), code=1)
    assert "error: the configuration asks for 2 processes, but this is one of 1; start it by torchrun" in said
    assert sorted(path.name for path in folder.glob("*")) == ["checkpoints"]


@pytest.mark.slow
def test_all_processes_end_where_the_first_is_refused(training_inputs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = stage(training_inputs, folder, TWO)
    with Lock.of_output(folder / "adapter_model.safetensors"):
        said = ended(started(command, folder), code=None)
    assert (
        f"is being made by another process; wait for it or end it, then run snakemake again (process {os.getpid()}"
        in said
    )


def test_fsdp_on_cpu_is_refused_and_not_run_as_ddp(base_manifest: Path, tmp_path: Path) -> None:
    """What the configuration refuses beforehand, asked of the trainer itself."""
    said = ended(first_update(base_manifest, tmp_path, 2, "fsdp"), code=None)
    assert "the model in training is a DistributedDataParallel, but `distributed` asks for a FSDPModule" in said
    assert list(tmp_path.glob("*.pt")) == []


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
@pytest.mark.parametrize(("device", "processes"), [("cpu", 2), ("cuda", 1)])
def test_strategies_that_would_do_nothing_are_refused(strategy: str, device: str, processes: int) -> None:
    raw = {"distributed": {"strategy": strategy, "processes": processes}, "policy": {"device": device}}
    with pytest.raises(ConfigurationError, match=f"distributed.strategy {strategy} needs policy.device cuda and"):
        load(raw)


def test_processes_share_the_completions_of_a_step_evenly(tmp_path: Path) -> None:
    training = {"imagereward": {"prompts_per_step": 12, "group_size": 2, "gradient_accumulation": 2}}
    for processes in (1, 2, 3, 4, 6, 12):
        c = load({"training": training, "tracks": ["imagereward"], "distributed": {"processes": processes}})
        given = grpo_config(TrainGrpo.of(c, "imagereward", 0), tmp_path, resumed=False)
        assert given.per_device_train_batch_size * given.gradient_accumulation_steps * processes == 24
    with pytest.raises(ConfigurationError, match="5 does not divide the 12 completions"):
        load({"training": training, "tracks": ["imagereward"], "distributed": {"processes": 5}})


# -------------------------------------------------------------------------------------------------------- the commands


def test_only_several_processes_are_part_of_the_stage() -> None:
    one, two = (TrainGrpo.of(load({"distributed": {"processes": n}}), "hpsv2", 0) for n in (1, 2))
    assert one.distributed is None and two.canonical() != one.canonical()
    assert load({}).model_dump()["distributed"] == {"processes": 1, "strategy": "ddp"}


def test_jobs_ask_for_the_gpus_that_they_use() -> None:
    cpu = load(TWO)
    assert [gpus(cpu, rule) for rule in ("train_grpo", "generate_rollouts", "make_tables")] == [0, 0, 0]
    assert launcher(cpu, "generate_rollouts") == "python"
    assert launcher(load({}), "train_grpo") == "python"
    cuda = load(TWO | {"policy": {"device": "cuda"}})
    assert [gpus(cuda, rule) for rule in ("train_grpo", "generate_rollouts", "make_tables")] == [2, 1, 0]
    assert launcher(cuda, "generate_rollouts") == "python -m workflow_scripts.running.take_gpus 1 python"
    several = launcher(cuda, "train_grpo")
    assert several.startswith("python -m workflow_scripts.running.take_gpus 2 python -m torch.distributed.run ")


def test_fsdp_and_deepspeed_reach_the_trainer() -> None:
    """Their settings only: both need GPUs to be run."""

    def settings(strategy: str) -> dict[str, Any]:
        training = {track: {"reward_signal": "sampled"} for track in ("imagereward", "hpsv2")}
        shared = {"distributed": {"processes": 2, "strategy": strategy}}
        c = load({"policy": {"device": "cuda"}, "training": training} | shared)
        return distributed_settings(TrainGrpo.of(c, "hpsv2", 0))

    assert settings("fsdp")["fsdp"] is True and settings("fsdp")["fsdp_config"]["version"] == 2
    assert settings("deepspeed")["deepspeed"]["zero_optimization"] == {"stage": 2}
    assert settings("ddp").keys() == {"ddp_find_unused_parameters"}
