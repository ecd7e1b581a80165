"""Arithmetic of jobs on a CPU: one instruction set, so that sums have the same digits on every x86-64 processor.

The libraries below choose their kernels by the processor, unless a variable says which when they are loaded. Sleef, the
vision libraries' resizing and PyTorch's own loops follow PyTorch's choice.
"""

import os
from functools import cache

import archspec.cpu

from workflow_scripts.configuration.model import Instructions

NEEDED = ("avx2", "fma")
NEWER = ("AVX512", "X86_V4")  # NumPy's names of what comes after AVX2; they differ between its versions
NUMPY = "NPY_DISABLE_CPU_FEATURES"
VARIABLES = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "ARROW_USER_SIMD_LEVEL": "AVX2",
    NUMPY: "",
}


@cache
def pinned(instructions: Instructions) -> dict[str, str]:
    """Environment variables that pin the instruction set; none where it is native or the processor lacks it."""
    if instructions == "native" or not is_capable():
        return {}
    from numpy._core._multiarray_umath import __cpu_dispatch__  # what numpy.show_runtime prints

    return VARIABLES | {NUMPY: " ".join(name for name in __cpu_dispatch__ if name.startswith(NEWER))}


def is_capable() -> bool:
    """Whether the processor has the pinned instructions."""
    return all(name in archspec.cpu.host() for name in NEEDED)


def processor() -> dict[str, str]:
    """Vendor and microarchitecture of the processor, and the instructions that this process uses: avx2 or native."""
    host, variables = archspec.cpu.host(), pinned("avx2")
    is_pinned = variables and variables.items() <= os.environ.items()
    return {"vendor": host.vendor, "name": host.name, "instructions": "avx2" if is_pinned else "native"}


def other_digits(instructions: Instructions) -> str | None:
    """Why this machine gives other digits than those with pinned instructions; None if it does not."""
    host = archspec.cpu.host()
    if instructions == "avx2" and not is_capable():
        return (
            f"the processor ({host.name}) has no {' and '.join(NEEDED).upper()}, which numeric_instructions asks for; "
            "results differ from published ones in their last digits, and trainings amplify that"
        )
    return None
