"""The GPUs of this machine as the NVIDIA driver reports them, and whether they can run what is asked. Without torch."""

import os
import re
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# Least driver and least compute capability of each major version of CUDA; all its minor versions run there (NVIDIA,
# CUDA Compatibility, "Minor Version Compatibility"; CUDA 13.0 release notes: architectures before Turing removed).
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
LEAST_CAPABILITY = {11: 3.5, 12: 5.0, 13: 7.5}
BFLOAT16 = 8.0  # compute capability of Ampere, the first with bfloat16 (CUDA C++ Programming Guide)
MEBIBYTE = 2**20  # nvidia-smi's unit


class GpuError(RuntimeError):
    """The GPUs cannot run a job: names the GPU, the number that is too small and the remedy."""


@dataclass(frozen=True)
class Gpu:
    """A GPU; memory in bytes, 0 where the driver does not know it."""

    index: str
    uuid: str
    name: str
    capability: float
    free: int
    total: int

    def __str__(self) -> str:
        """Name it for a message."""
        return f"GPU {self.index} ({self.name})"


def query(fields: str) -> list[list[str]]:
    """Ask nvidia-smi for fields of each GPU, memory in MiB.

    Raises:
        GpuError: there is no driver, or it does not answer.
    """
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stdout", None)
        raise GpuError(
            f"no GPU was found ({' '.join(told.split()) if told else error}); install the NVIDIA driver, or set "
            "policy.device to cpu"
        ) from None
    return [[value.strip() for value in line.split(",")] for line in said.splitlines() if line.strip()]


def visible_names() -> list[str]:
    """Indices or ids of this machine's GPUs, those of CUDA_VISIBLE_DEVICES where it is set.

    Raises:
        GpuError: the NVIDIA driver lists none.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return [index for (index,) in query("index")]


def cuda_of_torch() -> str | None:
    """Version of CUDA that the installed torch brings, such as 13.2; None for a torch without CUDA.

    It is read from torch's file, because importing torch takes seconds.
    """
    torch = find_spec("torch")
    version = Path(torch.origin).with_name("version.py") if torch and torch.origin else None
    found = re.search(r"^cuda.*= *'([\d.]+)'", version.read_text(encoding="utf-8"), re.M) if version else None
    return found[1] if found else None


def check_gpus(bfloat16: bool, memory: float, occupied: Collection[str] = ()) -> list[Gpu]:
    """Check that every visible GPU can run a job: driver, CUDA, compute capability, bfloat16 and free memory.

    Parts of a GPU (MIG) have names that nvidia-smi does not list as GPUs; of them only the driver is checked.

    Args:
        bfloat16: whether the job computes in bfloat16.
        memory: bytes that the job needs at least on each GPU.
        occupied: names of GPUs that other jobs hold now, whose free memory does not count.

    Returns:
        The visible GPUs.

    Raises:
        GpuError: one of them cannot.
    """
    cuda = cuda_of_torch()
    if cuda is None:
        raise GpuError(
            "the installed torch has no CUDA; install requirements.lock (make setup), or set policy.device to cpu"
        )
    major = int(cuda.split(".")[0])
    drivers = query("driver_version")
    driver, least = drivers[0][0] if drivers else "none", LEAST_DRIVER.get(major, max(LEAST_DRIVER.values()))
    if not drivers or int(driver.split(".")[0]) < least:
        raise GpuError(
            f"torch brings CUDA {cuda}, which needs NVIDIA driver {least} or newer, and this machine has {driver}; "
            "update the driver"
        )
    names, listed = visible_names(), _listed()
    found = []
    for name in names:
        if name.startswith("MIG"):
            continue
        gpu = next((one for one in listed if one.index == name or one.uuid.startswith(name)), None)
        if gpu is None:
            raise GpuError(
                f"CUDA_VISIBLE_DEVICES names GPU {name}, which the driver does not list (GPUs "
                f"{', '.join(one.index for one in listed)}); set it to GPUs of this machine"
            )
        found.append(gpu)
        _check(gpu, cuda, bfloat16, memory, name in occupied)
    if not names:
        raise GpuError("CUDA_VISIBLE_DEVICES hides all GPUs; set it to the GPUs to use, or policy.device to cpu")
    return found


def _listed() -> list[Gpu]:
    def bytes_of(value: str) -> int:
        return int(value) * MEBIBYTE if value.isdigit() else 0  # "[N/A]" where the CPU's memory is the GPU's

    rows = query("index,uuid,name,compute_cap,memory.free,memory.total")
    return [
        Gpu(index, uuid, name, float(capability), bytes_of(free), bytes_of(total))
        for index, uuid, name, capability, free, total in rows
    ]


def _check(gpu: Gpu, cuda: str, bfloat16: bool, memory: float, occupied: bool) -> None:
    major = int(cuda.split(".")[0])
    least, others = LEAST_CAPABILITY.get(major, max(LEAST_CAPABILITY.values())), "CUDA_VISIBLE_DEVICES to other GPUs"
    if gpu.capability < least:
        raise GpuError(
            f"{gpu} has compute capability {gpu.capability}, and CUDA {cuda} needs {least}; set {others}, or "
            "policy.device to cpu"
        )
    if bfloat16 and gpu.capability < BFLOAT16:
        raise GpuError(
            f"{gpu} has compute capability {gpu.capability}, and bfloat16 needs {BFLOAT16}; set policy.dtype to "
            f"float16, or {others}"
        )
    room = gpu.total if occupied else gpu.free
    if gpu.total and room < memory:
        raise GpuError(
            f"{gpu} has {room / 1e9:.1f} GB free of {gpu.total / 1e9:.1f}, and the weights alone need "
            f"{memory / 1e9:.1f}; end the processes that nvidia-smi lists, or set {others} or policy.hub to a "
            "smaller model"
        )
