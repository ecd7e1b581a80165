"""Run a command on GPUs that no other job uses.

python -m workflow_scripts.running.take_gpus 1 python -m workflow_scripts.stages.generate_rollouts …

Snakemake counts GPUs (`--resources gpu=2`) but does not assign them: two jobs would share the first one. The command
receives its GPUs as CUDA_VISIBLE_DEVICES, and the kernel keeps their locks as long as its process lives. Slurm has
assigned the GPUs of its jobs already.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class GpuError(RuntimeError):
    """There are fewer GPUs than a job needs: names the numbers and the remedy."""


def visible_gpus() -> list[str]:
    """Indices or ids of this machine's GPUs, those of CUDA_VISIBLE_DEVICES where it is set.

    Raises:
        GpuError: the NVIDIA driver lists none.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise GpuError(
            f"no GPU was found ({error}); set policy.device to cpu, or CUDA_VISIBLE_DEVICES to the GPUs to use"
        ) from None
    return said.stdout.split()


def take(count: int, gpus: list[str], folder: Path) -> list[tuple[str, int]] | None:
    """The first `count` free GPUs, each with the descriptor of its lock; None where fewer are free."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = []
    for gpu in gpus:
        descriptor = os.open(folder / f"{gpu}.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        taken.append((gpu, descriptor))
        if len(taken) == count:
            return taken
    # A job that waits holds no lock, so two jobs never wait for each other.
    for _, descriptor in taken:
        os.close(descriptor)
    return None


def main() -> None:
    """Take GPUs, then replace this process by the command."""
    count, command = int(sys.argv[1]), sys.argv[2:]
    if "SLURM_JOB_ID" not in os.environ:
        gpus = visible_gpus()
        if len(gpus) < count:
            raise GpuError(
                f"this job uses {count} GPUs, but there are {len(gpus)} ({', '.join(gpus) or 'none'}); set "
                "distributed.processes to the number of GPUs, or CUDA_VISIBLE_DEVICES to the GPUs to use"
            )
        folder = Path(tempfile.gettempdir()) / f"softpref-gpus-{os.getuid()}"
        taken = take(count, gpus, folder)
        if taken is None:
            print(f"waiting for {count} of the GPUs {', '.join(gpus)}", file=sys.stderr, flush=True)
        while taken is None:
            time.sleep(1)
            taken = take(count, gpus, folder)
        for _, descriptor in taken:
            os.set_inheritable(descriptor, True)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for gpu, _ in taken)
        print(f"on GPU {os.environ['CUDA_VISIBLE_DEVICES']}", file=sys.stderr, flush=True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    try:
        main()
    except GpuError as error:
        sys.exit(f"error: {error}")
