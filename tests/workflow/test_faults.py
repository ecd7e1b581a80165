"""kill -9 at named points and at random moments, too little memory, full and read-only disks.

Going on as documented gives the tables of a run that nothing disturbed.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from checkout import Workflow, environment

from workflow_scripts.running.provenance import verify

TABLES = ("table1.csv", "table2.csv", "comparisons.csv", "sensitivity.csv", "tables.md")

# Stands in a copy of the repository, where every stage's interpreter imports it at start. It strikes from within the
# stage at an event that CPython reports to audit hooks (a file opened, renamed, a folder made), so that nothing in the
# code under test knows of it.
SITECUSTOMIZE = """
import json, os, re, signal, sys, time
from pathlib import Path

plan = json.loads(os.environ.get("FAULT") or "null")
stage = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
struck = plan and Path(plan["struck"])


def strike(arguments):
    if struck.exists():
        return
    struck.write_text(" ".join(map(str, arguments)))
    if plan["cut"]:
        os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
    if plan["who"] in ("snakemake", "all"):
        import psutil
        for parent in psutil.Process().parents():
            if any(word.endswith("snakemake") for word in parent.cmdline()[:3]):
                parent.kill()
                while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.01)
    if plan["who"] in ("stage", "all"):
        os.kill(os.getpid(), signal.SIGKILL)
    if plan["who"] == "kernel":
        Path(plan["group"], "cgroup.procs").write_text(str(os.getpid()))


def watch(event, arguments):
    global armed
    if armed == 0:
        if event != "os.rename":
            armed = -1
            strike(arguments)
    elif armed > 0 and event == plan["event"] and re.search(plan["path"], " ".join(map(str, arguments))):
        if plan["after"]:
            armed = 0
        else:
            armed -= 1
            if armed == 0:
                armed = -1
                strike(arguments)


if plan and stage == "workflow_scripts.stages." + plan["stage"] and not struck.exists():
    armed = plan["times"]
    if plan["event"] == "start":
        strike(())
    else:
        sys.addaudithook(watch)
"""


@dataclass
class Fault:
    """Where a stage is struck, and who dies: the stage, all of the workflow, or only snakemake (the stage goes on).

    "kernel" does not kill: from then on the stage gets next to no memory any more, until the kernel kills it.
    """

    event: str
    who: str
    path: str = ""
    times: int = 1
    cut: bool = False
    """Halve the temporary file first, as if the kill had come in the middle of writing it."""
    after: bool = False
    """Strike not at the event but at the next thing that the stage does."""
    group: str = ""
    """Control group without memory, for the kernel."""


RESULTS = "results/test"
EVERYWHERE = {
    "orphaned at the start": Fault("start", "snakemake"),
    "at the start": Fault("start", "all"),
    "in the middle of writing": Fault("os.rename", "all", RESULTS, cut=True),
    "before the provenance": Fault("os.rename", "stage", "provenance.json"),
    "after the provenance": Fault("os.rename", "all", "provenance.json", after=True),
}
MORE = {
    "synthesize_dataset": {"between archives": Fault("open", "all", r"validation_1\.zip")},
    "train_grpo": {
        "in the middle of the first checkpoint": Fault("open", "all", r"checkpoint-2/trainer_state\.json"),
        "between checkpoints": Fault("os.mkdir", "all", r"checkpoint-4"),
        "before the second output": Fault("os.rename", "all", r"adapter_config\.json"),
    },
    "make_tables": {"between tables": Fault("os.rename", "all", r"comparisons\.csv")},
}
TARGETS = {
    "synthesize_dataset": f"{RESULTS}/downloads/synthetic/imagereward/dataset.json",
    "read_annotations": f"{RESULTS}/datasets/imagereward/test/preferences.parquet",
    "select_subset": f"{RESULTS}/datasets/hpsv2/validation/subset.parquet",
    "read_images": f"{RESULTS}/datasets/imagereward/test/images-0000.parquet",
    "prepare_base_policy": f"{RESULTS}/policies/base/manifest.json",
    "train_grpo": f"{RESULTS}/policies/imagereward/seed0/adapter_model.safetensors",
    "generate_rollouts": f"{RESULTS}/rollouts/imagereward/grpo/seed0/imagereward/0000-0000.parquet",
    "score_rollouts": f"{RESULTS}/scores/imagereward/grpo/seed0/imagereward.parquet",
    "make_gallery": f"{RESULTS}/gallery/imagereward/grpo/seed0/imagereward.parquet",
    "measure_accuracy": f"{RESULTS}/accuracy/imagereward/grpo/seed0/imagereward.json",
    "make_tables": f"{RESULTS}/table1.csv",
}
# The stage's own first: a stage that is orphaned ends, and a training that has ended leaves no checkpoint.
KILLS = [(stage, fault) for stage in TARGETS for fault in (MORE.get(stage, {}) | EVERYWHERE).values()]
KILLS_OF_TABLES = [
    MORE["make_tables"]["between tables"],
    EVERYWHERE["in the middle of writing"],
    EVERYWHERE["before the provenance"],
]
RANDOM_KILLS = 12


@dataclass
class Checkout:
    """A copy of the repository with the hook in it, where the workflow runs as a user runs it."""

    folder: Path
    strikes: int = 0
    cut_runs: int = 0
    """Strikes that came while the stage had its MLflow run open."""

    @property
    def results(self) -> Path:
        """Folder of the results."""
        return self.folder / RESULTS

    @property
    def client(self) -> mlflow.MlflowClient:
        """Access to the tracking store."""
        return mlflow.MlflowClient(f"sqlite:///{self.folder}/mlflow.db")

    def start(self, *words: str, fault: dict[str, Any] | None = None) -> subprocess.Popen[str]:
        """Start snakemake in a process group of its own."""
        variables = environment() | {"FAULT": json.dumps(fault)}
        command = [sys.executable, "-m", "snakemake", *words, "--configfile", "configs/test.yaml"]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=variables, start_new_session=True, **pipes)

    def finish(self, *words: str) -> str:
        """Do as the documentation says after a kill: wait for what still runs, unlock, and run the same again."""
        self.wait_for_orphans()
        unlocked = self.start("--unlock")
        assert unlocked.wait(timeout=600) == 0, unlocked.communicate()[0]
        process = self.start("--cores", "2", *words)
        said = process.communicate(timeout=1800)[0]
        assert process.returncode == 0, said
        return said

    def struck(self, stage: str, fault: Fault, *words: str) -> str:
        """Run until the stage is struck; return what snakemake said."""
        self.strikes += 1
        self.cut_runs += fault.event != "start"
        mark = self.folder / f"struck-{self.strikes}"
        process = self.start("--cores", "1", *words, fault={"stage": stage, "struck": str(mark), **vars(fault)})
        said = process.communicate(timeout=1800)[0]
        assert mark.exists(), f"{stage} never came to {fault}:\n{said}"
        assert process.returncode != 0, said
        return said

    def unlock(self) -> None:
        """Remove the lock that a killed snakemake leaves."""
        self.wait_for_orphans()
        unlocked = self.start("--unlock")
        assert unlocked.wait(timeout=600) == 0, unlocked.communicate()[0]

    def wait_for_orphans(self) -> None:
        """Wait for stages that a killed snakemake has left running."""
        for process in psutil.process_iter(["cwd", "cmdline"]):
            if process.info["cwd"] == str(self.folder) and "-m" in (process.info["cmdline"] or []):
                process.wait(timeout=600)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """Return a fresh checkout with the hook in it."""
    return hooked(Workflow.checkout(tmp_path / "checkout"))


def hooked(workflow: Workflow) -> Checkout:
    """Put the hook into a checkout."""
    (workflow.folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return Checkout(workflow.folder)


def remove_results_of(checkout: Checkout, *stages: str) -> None:
    """Remove what these stages have made."""
    for sidecar in list(checkout.results.rglob("*.provenance.json")):
        record = json.loads(sidecar.read_text())
        if record["stage"] in stages:
            for name in record["outputs"]:
                (sidecar.parent / name).unlink()
            sidecar.unlink()


def assert_equal_to(undisturbed: Path, checkout: Checkout) -> None:
    """Final tables, adapters and all tables between are those of a run that nothing disturbed."""
    for name in TABLES:
        assert (checkout.results / name).read_bytes() == (undisturbed / name).read_bytes(), name
    kinds = ("*.parquet", "*.safetensors", "training.json")
    found = {path.relative_to(undisturbed) for kind in kinds for path in undisturbed.rglob(kind)}
    assert found == {path.relative_to(checkout.results) for kind in kinds for path in checkout.results.rglob(kind)}
    for path in found:
        assert (checkout.results / path).read_bytes() == (undisturbed / path).read_bytes(), path
    for sidecar in checkout.results.rglob("*.provenance.json"):
        verify(sidecar.with_name(sidecar.name.removesuffix(".provenance.json")))
    assert not list(checkout.results.rglob("*.tmp"))


def assert_no_half_written_file(undisturbed: Path, checkout: Checkout) -> None:
    """What can be seen of the results after a kill is whole: it has the bytes that it has in the end."""
    for kind in ("*.parquet", "*.safetensors", "*.csv"):
        for path in checkout.results.rglob(kind):
            relative = path.relative_to(checkout.results)
            if "checkpoints" not in relative.parts and "downloads" not in relative.parts:
                assert path.read_bytes() == (undisturbed / relative).read_bytes(), relative


def assert_one_finished_run_per_stage(checkout: Checkout) -> None:
    """Every stage instance is one finished run; every run that was cut is failed, nothing is left running."""
    runs = checkout.client.search_runs(["1"], max_results=1000)
    finished = Counter(run.data.tags["stage_key"] for run in runs if run.info.status == "FINISHED")
    sidecars = [json.loads(path.read_text()) for path in checkout.results.rglob("*.provenance.json")]
    assert finished == Counter(sidecar["stage_key"] for sidecar in sidecars)
    status = Counter(run.info.status for run in runs)
    assert status.keys() <= {"FINISHED", "FAILED"} and (not checkout.strikes or status["FAILED"] == checkout.cut_runs)


# ------------------------------------------------------------------------------------------------------------ kill -9


@pytest.mark.cases(len(KILLS_OF_TABLES))
def test_tables_killed_while_they_are_written(workflow: Workflow, tmp_path: Path) -> None:
    """The short version: the last stage at half of its points, on results whose other stages are finished."""
    checkout = hooked(workflow.copy(tmp_path / "checkout"))
    remove_results_of(checkout, "make_tables")
    for fault in KILLS_OF_TABLES:
        checkout.struck("make_tables", fault)
        assert_no_half_written_file(workflow.results, checkout)
        checkout.unlock()
    checkout.finish()
    assert_equal_to(workflow.results, checkout)
    assert_one_finished_run_per_stage(checkout)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.cases(len(KILLS))
def test_every_stage_killed_at_every_point(workflow: Workflow, checkout: Checkout) -> None:
    for stage, fault in KILLS:
        checkout.struck(stage, fault, TARGETS[stage])
        assert_no_half_written_file(workflow.results, checkout)
        checkout.unlock()
    checkout.finish()
    assert_equal_to(workflow.results, checkout)
    assert_one_finished_run_per_stage(checkout)
    trainings = checkout.client.search_runs(
        ["1"], "tags.stage = 'train_grpo' and tags.track = 'imagereward'", order_by=["attributes.start_time"]
    )
    # Killed before the first checkpoint was whole, and before the second; after both; then some more.
    resumed = [training.data.metrics.get("resumed_from_step") for training in trainings]
    assert resumed[:3] == [None, None, 2] and resumed[-1] == 4


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.cases(RANDOM_KILLS)
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments(workflow: Workflow, checkout: Checkout, seed: int) -> None:
    rng = random.Random(f"kills {seed}")
    for _ in range(RANDOM_KILLS):
        process = checkout.start("--cores", "2")
        time.sleep(rng.uniform(2, 40))
        if rng.random() < 0.5:
            process.kill()  # its stages go on
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        checkout.unlock()
        assert_no_half_written_file(workflow.results, checkout)
    checkout.finish()
    assert_equal_to(workflow.results, checkout)
    assert_one_finished_run_per_stage(checkout)


# ------------------------------------------------------------------------------------------------ disks and memory


@pytest.fixture
def small_disk(workflow: Workflow, tmp_path: Path) -> Iterator[Checkout]:
    """Yield a finished checkout without tables and accuracies, its results on a file system of their own."""
    checkout = hooked(workflow.copy(tmp_path / "checkout"))
    aside = checkout.results.rename(checkout.folder / "aside")
    checkout.results.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500m", "tmpfs", str(checkout.results)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    shutil.copytree(aside, checkout.results, dirs_exist_ok=True)
    remove_results_of(checkout, "make_report", "make_figures", "make_tables", "measure_accuracy")
    yield checkout
    checkout.wait_for_orphans()
    subprocess.run(["umount", str(checkout.results)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a mounted file system."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def test_a_full_disk_is_said_and_the_rerun_goes_on(workflow: Workflow, small_disk: Checkout) -> None:
    for log in small_disk.results.rglob("*.log"):
        os.truncate(log, 0)  # so that logs written anew do not make room
    used = os.statvfs(small_disk.results)
    remount(small_disk.results, f"size={(used.f_blocks - used.f_bfree) * used.f_frsize + 24_000}")
    process = small_disk.start("--cores", "1", "--keep-going")
    said = process.communicate(timeout=1800)[0]
    assert process.returncode != 0 and "No space left on device" in said, said
    remount(small_disk.results, "size=500m")
    small_disk.finish()
    assert_equal_to(workflow.results, small_disk)


def test_a_read_only_results_folder_is_said_and_the_rerun_goes_on(workflow: Workflow, small_disk: Checkout) -> None:
    remount(small_disk.results, "ro")
    process = small_disk.start("--cores", "1")
    said = process.communicate(timeout=1800)[0]
    assert process.returncode != 0 and re.search("Read-only file system: '?[^ ]*results/test", said), said
    remount(small_disk.results, "rw")
    small_disk.finish()
    assert_equal_to(workflow.results, small_disk)


@pytest.fixture
def no_memory() -> Iterator[Path]:
    """A control group whose processes may take one more megabyte: the kernel kills what asks for more."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # of the two versions of control groups
    limits = {"memory.limit_in_bytes": "1M", "memory.swappiness": "0"}
    if not first.is_dir():
        first, limits = second, {"memory.max": "1M", "memory.swap.max": "0"}
    group = first / f"softpref-test-{os.getpid()}"
    try:
        group.mkdir()
        for name, value in limits.items():
            (group / name).write_text(value)
    except OSError as error:
        pytest.skip(f"needs the right to limit the memory of a control group: {error}")
    else:
        yield group
    finally:
        if group.is_dir():
            group.rmdir()


def killed_for_memory(group: Path) -> bool:
    """Whether the kernel has killed a process of a control group because there was no memory."""
    counts = "".join(
        path.read_text() for path in (group / "memory.oom_control", group / "memory.events") if path.exists()
    )
    return re.search(r"^oom_kill [1-9]", counts, re.M) is not None


def test_a_stage_without_memory_is_said_and_the_rerun_goes_on(
    workflow: Workflow, no_memory: Path, tmp_path: Path
) -> None:
    checkout = hooked(workflow.copy(tmp_path / "checkout"))
    remove_results_of(checkout, "make_tables", "measure_accuracy")
    said = checkout.struck("measure_accuracy", Fault("start", "kernel", group=str(no_memory)))
    assert killed_for_memory(no_memory)
    assert "Error in rule measure_accuracy" in said and "logs/measure_accuracy" in said and "Killed" in said, said
    checkout.finish()
    assert_equal_to(workflow.results, checkout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_training_without_memory_goes_on_from_its_checkpoint(
    workflow: Workflow, no_memory: Path, tmp_path: Path
) -> None:
    checkout = hooked(workflow.copy(tmp_path / "checkout"))
    remove_results_of(checkout, "train_grpo")
    written = Fault("open", "kernel", r"checkpoint-2/trainer_state\.json", after=True, group=str(no_memory))
    said = checkout.struck("train_grpo", written, TARGETS["train_grpo"])
    assert killed_for_memory(no_memory) and "Killed" in said, said
    checkout.finish(TARGETS["train_grpo"])
    adapter = Path(TARGETS["train_grpo"])
    assert (checkout.folder / adapter).read_bytes() == (workflow.folder / adapter).read_bytes()
    sidecar = verify(checkout.folder / adapter)
    assert checkout.client.get_run(sidecar["mlflow_run_id"]).data.metrics["resumed_from_step"] == 2
