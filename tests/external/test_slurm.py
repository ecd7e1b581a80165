"""The workflow on a real Slurm of one node (slurm_node.sh), its node failing once: the same tables as a local run."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml
from checkout import Workflow, environment
from nvidia_smi import H100, fake_nvidia_smi

from workflow_scripts.files.paths import ROOT
from workflow_scripts.running.provenance import verify

NODE = Path(__file__).with_name("slurm_node.sh")
TABLES = ("table1.csv", "table2.csv", "comparisons.csv", "sensitivity.csv", "tables.md")
# The first look after 2 s instead of 40, and not at accounting, which this Slurm has none of.
SLURM = ("--workflow-profile", "profiles/slurm", "--slurm-status-command", "squeue")
SLURM += ("--slurm-init-seconds-before-status-checks", "2")


def test_both_profiles_say_the_same_of_reruns() -> None:
    """--workflow-profile takes the place of profiles/default; all but the limit of GPUs must be said again."""
    local, slurm = (
        yaml.safe_load((ROOT / "profiles" / name / "profile.yaml").read_text()) for name in ("default", "slurm")
    )
    del local["resources"]
    assert local.items() <= slurm.items()


def wait_until(condition: Callable[[], bool], seconds: float = 600) -> None:
    """Wait for something that happens in other processes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of a running cluster."""
    if shutil.which("slurmctld") is None or os.geteuid():
        pytest.skip(f"needs root and Slurm: {NODE.relative_to(ROOT)} install")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    subprocess.run([NODE, "start", folder], check=True)
    yield folder
    subprocess.run([NODE, "stop", folder], check=True)


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """Return the address of a tracking server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        f"{tmp_path}/store",
    ]
    server = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)

    def answers() -> bool:
        assert server.poll() is None
        try:
            return urllib.request.urlopen(f"{uri}/health", timeout=5).status == 200
        except OSError:
            return False

    wait_until(answers)
    yield uri
    os.killpg(server.pid, signal.SIGTERM)
    server.wait()


def running(rule: str) -> list[str]:
    """Slurm's ids of the running jobs of a rule."""
    command = ["squeue", "--noheader", "--states=RUNNING", "--format=%i %k"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[0] for line in lines if f"rule_{rule}" in line]


def node_fails(folder: Path) -> None:
    """End the node's daemon and all that it has started, as a power failure does, and start the daemon again."""
    daemon = psutil.Process(int((folder / "slurmd.pid").read_text()))
    steps = [process for process in psutil.process_iter(["name"]) if process.info["name"] == "slurmstepd"]
    for process in [daemon, *steps, *(child for step in steps for child in step.children(recursive=True))]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    wait_until(lambda: not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE)
    subprocess.run(["slurmd"], check=True)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_tables_from_slurm_are_those_of_a_local_run(slurm: Path, mlflow_server: str, tmp_path: Path) -> None:
    remote = Workflow.checkout(tmp_path / "remote")
    command = [sys.executable, "-m", "snakemake", *SLURM, "--configfile", "configs/test.yaml"]
    variables = environment() | {"MLFLOW_TRACKING_URI": mlflow_server}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=remote.folder, env=variables, stdout=said, stderr=said)
        wait_until(lambda: bool(process.poll() is not None or running("train_grpo")), seconds=1800)
        (failed, *_) = running("train_grpo")
        logs = remote.results / "logs/train_grpo"
        wait_until(lambda: any("train_grpo · " in log.read_text() for log in logs.glob("*.log")))
        node_fails(slurm)
        process.wait(timeout=3000)
    everything = (tmp_path / "said").read_text()
    assert process.returncode == 0, everything

    shown = subprocess.run(["scontrol", "show", "job", failed], capture_output=True, text=True, check=True).stdout
    assert "Restarts=1" in shown and "JobState=COMPLETED" in shown
    local = Workflow.checkout(tmp_path / "local")
    local.snakemake("--cores", "2", MLFLOW_TRACKING_URI="")
    for name in TABLES:
        assert (remote.results / name).read_bytes() == (local.results / name).read_bytes(), name
    # Every job ran through Slurm, in the environment that the Snakefile sets, and is one finished run of the server.
    outputs = [Path(str(path).removesuffix(".provenance.json")) for path in remote.results.rglob("*.provenance.json")]
    sidecars = [verify(output) for output in outputs]
    assert everything.count("has been submitted with SLURM jobid") == len(sidecars)
    client = mlflow.MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("softpref-test")
    assert experiment
    runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'", max_results=1000)
    assert {run.info.run_id for run in runs} == {sidecar["mlflow_run_id"] for sidecar in sidecars}
    # What Slurm made is whole to a local workflow: the profiles agree.
    assert remote.planned() == []


@pytest.mark.slow
def test_jobs_get_the_gpus_and_the_memory_that_the_configuration_says(slurm: Path, tmp_path: Path) -> None:
    """With the rules' own resources, in a workflow of two jobs that only say what they were given."""
    (tmp_path / "Snakefile").write_text(f"""
import sys
sys.path.insert(0, "{ROOT}")
from workflow_scripts.configuration.model import load
from workflow_scripts.configuration.jobs import job_resources, launcher

c = load({{
    "policy": {{"device": "cuda"}}, "resources": {{"generate_rollouts": {{"memory_gigabytes": 1.5, "minutes": 7}}}}
}})
rule all:
    input: "0.txt", "1.txt"
rule generate_rollouts:
    output: "{{job}}.txt"
    resources: **job_resources(c, "generate_rollouts")
    shell: launcher(c, "generate_rollouts") + " say.py > {{output}}"
""")
    (tmp_path / "say.py").write_text(
        "import json, os, subprocess\n"
        "job = os.environ['SLURM_JOB_ID']\n"
        "shown = subprocess.run(['scontrol', 'show', 'job', job], capture_output=True, text=True).stdout.split()\n"
        "words = dict(word.split('=', 1) for word in shown if '=' in word)\n"
        "print(json.dumps({'gpu': os.environ['CUDA_VISIBLE_DEVICES'], **words}))\n"
    )
    profile = str(ROOT / "profiles" / "slurm")
    path = f"{Path(sys.executable).parent}:{fake_nvidia_smi(tmp_path / 'bin', H100, H100)}"  # each job checks its GPU
    variables = environment() | {"PATH": path, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", profile, *SLURM[2:]]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [json.loads((tmp_path / f"{number}.txt").read_text()) for number in (0, 1)]
    for job in jobs:
        assert job["gpu"] in ("0", "1")
        assert job["TimeLimit"] == "00:07:00" and job["MinMemoryNode"] == "1500M"
        assert job["TresPerJob"].endswith("gpu:1")
