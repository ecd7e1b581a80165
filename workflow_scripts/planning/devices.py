"""GPUs as their vendors state them, this machine's CPU as measured, and what no data sheet says."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

FACTS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("facts.yaml").read_text(encoding="utf-8"))
GIGABYTE = 2**30  # what vendors call a GB of memory
CPU = "cpu"


class PlanError(ValueError):
    """Something cannot be planned: says what, and what to change."""


@dataclass(frozen=True)
class Gpu:
    """A device: products in FLOP/s, memory in bytes, bandwidth in bytes/s, all at their peak."""

    name: str
    flops: float
    memory: float
    bandwidth: float


class Assumptions(BaseModel):
    """What no data sheet says; each is an option of `plan`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    flops_used: float = 0.35
    """Share of the peak FLOP/s that prefill, scoring and training reach (MFU)."""
    bandwidth_used: float = 0.6
    """Share of the peak bandwidth that decoding reaches."""
    kernel_microseconds: float = 20.0
    """Time that transformers takes to launch a kernel from Python; decoding cannot be faster than its launches."""
    vllm_row_microseconds: float = 20.0
    """Time in which vLLM schedules, samples and reads the text of a row between two decoding steps."""
    vllm_start_seconds: float = 90.0
    """Time in which vLLM compiles, captures CUDA graphs and measures its memory, for each load."""
    start_seconds: float = 15.0
    """Time in which a job imports its libraries and prepares its model, weights aside."""
    load_gigabytes_per_second: float = 1.0
    """Rate at which weights come from the disk to the device."""
    memory_reserved: float = 0.1
    """Share of the memory that CUDA's context, cuBLAS and fragments take."""
    completion_share: float = 0.5
    """Mean length of a completion as a share of its budget, where the policy has not been measured."""


def data_sheet(name: str) -> Gpu:
    """Return a GPU of facts.yaml as its vendor states it."""
    stated = FACTS["gpus"][name]
    return Gpu(name, stated["teraflops"] * 1e12, stated["memory"] * GIGABYTE, stated["bandwidth"] * 1e9)


def this_cpu(threads: int) -> Gpu:
    """Measure this machine's CPU by its own time: float32 products of 512 x 512, and reading memory."""
    import psutil
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    block = torch.randn(2**24)
    rates = {}
    for name, run, work in (("flops", lambda: a @ b, 2 * 512**3), ("bandwidth", block.sum, 4 * 2**24)):
        run()
        started = time.process_time()  # of all threads; what other processes do meanwhile is left out
        for _ in range(20):
            run()
        rates[name] = work * 20 * threads / (time.process_time() - started)
    return Gpu(CPU, rates["flops"], psutil.virtual_memory().total, rates["bandwidth"])
