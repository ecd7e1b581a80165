"""GPUs of their own for jobs that run side by side: real processes, no GPU needed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nvidia_smi import A100, H100, T4, fake_nvidia_smi

from workflow_scripts.files.paths import ROOT
from workflow_scripts.running.take_gpus import occupied, take

JOB = "import os, sys; print(os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True); sys.stdin.read()"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Return a function that starts a job which says its GPUs and stays until its input ends."""
    jobs = []

    def start(count: int, *needs: str, **variables: str) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "SLURM_"))}
        six = fake_nvidia_smi(tmp_path / "six", *[H100.replace("1a2b", str(i)) for i in range(6)])
        environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "PATH": six} | variables
        command = [sys.executable, "-m", "workflow_scripts.running.take_gpus", *needs, str(count)]
        command += [sys.executable, "-c", JOB]
        pipe = subprocess.PIPE
        jobs.append(subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()
        job.communicate()


def gpus(job: subprocess.Popen[str]) -> str:
    """GPUs that a job says it has; waits for it to begin."""
    assert job.stdout
    return job.stdout.readline().strip()


def test_jobs_side_by_side_have_different_gpus(start: Any) -> None:
    jobs = [start(1, CUDA_VISIBLE_DEVICES="3,5") for _ in range(2)]
    assert sorted(map(gpus, jobs)) == ["3", "5"]


def test_a_job_waits_for_a_gpu_until_another_ends_however_it_ends(start: Any) -> None:
    first = start(2, CUDA_VISIBLE_DEVICES="0,1")
    assert gpus(first) == "0,1"
    second = start(1, CUDA_VISIBLE_DEVICES="0,1")
    assert second.stderr.readline() == "waiting for 1 of the GPUs 0, 1\n"
    first.send_signal(signal.SIGKILL)
    assert gpus(second) == "0"


def test_more_gpus_than_there_are_is_refused(start: Any) -> None:
    job = start(3, CUDA_VISIBLE_DEVICES="0,1")
    assert "error: this job uses 3 GPUs, but there are 2 (0, 1); set distributed.processes to" in job.communicate()[1]
    assert job.returncode == 1


def test_gpus_are_those_that_the_driver_lists(start: Any, tmp_path: Path) -> None:
    assert gpus(start(2, PATH=fake_nvidia_smi(tmp_path / "two", H100, A100))) == "0,1"


def test_no_driver_is_told(start: Any, tmp_path: Path) -> None:
    job = start(1, PATH=str(tmp_path))
    assert "error: no GPU was found" in job.communicate()[1] and job.returncode == 1


def test_a_job_of_slurm_has_its_gpus(start: Any) -> None:
    """Two of them on one node may both see theirs as number 0."""
    jobs = [start(1, CUDA_VISIBLE_DEVICES="0", SLURM_JOB_ID="7") for _ in range(2)]
    assert [gpus(job) for job in jobs] == ["0", "0"]


@pytest.mark.parametrize("variables", [{}, {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0"}], ids=["here", "Slurm"])
def test_a_gpu_that_cannot_run_the_job_is_told_before_it_starts(
    start: Any, tmp_path: Path, variables: dict[str, str]
) -> None:
    path = fake_nvidia_smi(tmp_path / "old", T4)
    job = start(1, "--bfloat16", PATH=path, **variables)
    said, told = job.communicate()
    assert said == "" and job.returncode == 1
    assert told.splitlines()[-1].startswith(
        "error: GPU 0 (Tesla T4) has compute capability 7.5, and bfloat16 needs 8.0"
    )
    job = start(1, "--gigabytes", "16.6", PATH=path, **variables)
    assert "the weights alone need 16.6; end the processes" in job.communicate()[1] and job.returncode == 1
    assert gpus(start(1, "--gigabytes", "7.5", PATH=path, **variables)) == "0"


def test_gpus_that_jobs_hold_are_known(start: Any, tmp_path: Path) -> None:
    folder = tmp_path / f"softpref-gpus-{os.getuid()}"
    job = start(1, CUDA_VISIBLE_DEVICES="1")
    assert gpus(job) == "1"
    assert occupied(["0", "1", "2"], folder) == {"1"}
    job.kill()
    job.wait()
    assert occupied(["0", "1", "2"], folder) == set()


@given(wanted=st.lists(st.integers(1, 4), max_size=8), there=st.integers(1, 6))
def test_no_gpu_is_given_twice_and_none_is_held_by_whoever_waits(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[int], there: int
) -> None:
    folder = tmp_path_factory.mktemp("locks")
    names = [str(i) for i in range(there)]
    held: list[tuple[str, int]] = []
    for count in wanted:
        taken = take(count, names, folder)
        assert (taken is None) == (len(held) + count > there)
        held += taken or []
    assert len({name for name, _ in held}) == len(held)
    for _, descriptor in held:
        os.close(descriptor)
    assert len(take(there, names, folder) or []) == there
