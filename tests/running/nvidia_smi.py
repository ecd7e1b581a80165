"""A stand-in for nvidia-smi that answers queries about GPUs of any kind."""

import os
import sys
from pathlib import Path

H100 = "GPU-1a2b, NVIDIA H100 80GB HBM3, 9.0, 81007, 81559"
A100 = "GPU-2c3d, NVIDIA A100-SXM4-40GB, 8.0, 40338, 40960"
V100 = "GPU-3e4f, Tesla V100-SXM2-32GB, 7.0, 32000, 32768"
T4 = "GPU-5a6b, Tesla T4, 7.5, 15000, 15360"

ANSWER = """
import sys
query, gpus, driver = sys.argv[1].removeprefix("--query-gpu=").split(","), {gpus}, {driver!r}
assert sys.argv[2] == "--format=csv,noheader,nounits"
if "compute_cap" in query and int(driver.split(".")[0]) < 510:
    sys.exit('Field "compute_cap" is not a valid field to query.')
names = ("index", "uuid", "name", "compute_cap", "memory.free", "memory.total", "driver_version")
for index, gpu in enumerate(gpus):
    known = dict(zip(names, [str(index), *gpu.split(", "), driver], strict=True))
    print(", ".join(known[name] for name in query))
"""


def fake_nvidia_smi(folder: Path, *gpus: str, driver: str = "580.65.06") -> str:
    """Write a nvidia-smi that lists these GPUs, as by uuid, name, compute capability, free and total MiB.

    Returns:
        The PATH on which it comes first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!{sys.executable}\n{ANSWER.format(gpus=list(gpus), driver=driver)}")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
