"""Arithmetic of jobs on a CPU: one instruction set, whatever more the processor has.

Each of these libraries chooses its kernels by the processor, unless a variable says which when it is loaded. A sum that
takes 16 numbers at a time has other last digits than one that takes 8.
"""

import os

from archspec.cpu import host
from archspec.cpu.detect import detected_info

from workflow_scripts.configuration.model import Instructions

NEEDED = {"avx2", "fma"}
# What comes after AVX2, by the names that NumPy had up to 2.3 and has from 2.4. It passes over names of other versions.
NEWER = "AVX512F AVX512CD AVX512_KNL AVX512_KNM AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR X86_V4"
VARIABLES = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2",  # on processors that are not Intel's MKL takes AUTO for it
    "OPENBLAS_CORETYPE": "Haswell",
    "ARROW_USER_SIMD_LEVEL": "AVX2",
    "NPY_DISABLE_CPU_FEATURES": NEWER,
    "NPY_ENABLE_CPU_FEATURES": "",  # NumPy refuses both
}


def pinned(instructions: Instructions) -> dict[str, str]:
    """Environment variables that pin the instruction set; none where it is native or the processor lacks it."""
    return VARIABLES if instructions == "avx2" and is_capable() else {}


def is_capable() -> bool:
    """Whether the processor has the pinned instructions."""
    return bool(detected_info().features >= NEEDED)


def processor() -> dict[str, str]:
    """Vendor and microarchitecture of the processor, and the instructions that this process uses: avx2 or native."""
    is_pinned = is_capable() and VARIABLES.items() <= os.environ.items()
    instructions = "avx2" if is_pinned else "native"
    return {"vendor": detected_info().vendor, "name": host().name, "instructions": instructions}


def other_digits(instructions: Instructions) -> str | None:
    """Why this machine gives other digits than those of pinned instructions; None if it does not."""
    if instructions == "native" or is_capable():
        return None
    lacking = ", ".join(sorted(NEEDED - detected_info().features)).upper()
    return (
        f"this processor ({host().name}) has no {lacking}, which numeric_instructions: avx2 asks for; results differ "
        "from published ones in their last digits, and trainings amplify that"
    )
