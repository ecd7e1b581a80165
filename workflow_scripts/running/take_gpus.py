"""Run a command on GPUs that no other job uses, after checking that they can run it.

python -m workflow_scripts.running.take_gpus 1 python -m workflow_scripts.stages.generate_rollouts …

Snakemake counts GPUs (`--resources gpu=2`) but does not assign them: two jobs would share the first one. The command
receives its GPUs as CUDA_VISIBLE_DEVICES, and the kernel keeps their locks as long as its process lives. Slurm has
assigned the GPUs of its jobs already.
"""

import argparse
import fcntl
import os
import sys
import tempfile
import time
from pathlib import Path

from workflow_scripts.running.gpus import GpuError, check_gpus, visible_names


def locks() -> Path:
    """Folder of this user's locks, one for each GPU."""
    return Path(tempfile.gettempdir()) / f"softpref-gpus-{os.getuid()}"


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


def occupied(gpus: list[str], folder: Path) -> set[str]:
    """GPUs that jobs of this user hold now."""
    held = set()
    for gpu in gpus:
        taken = take(1, [gpu], folder)
        held |= set() if taken else {gpu}
        for _, descriptor in taken or []:
            os.close(descriptor)
    return held


def main() -> None:
    """Take GPUs, check them, then replace this process by the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bfloat16", action="store_true", help="the command computes in bfloat16")
    parser.add_argument("--gigabytes", type=float, default=0, help="memory that it needs at least on each GPU")
    parser.add_argument("count", type=int, help="number of GPUs")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    count, command = arguments.count, arguments.command
    if "SLURM_JOB_ID" not in os.environ:
        gpus = visible_names()
        if len(gpus) < count:
            raise GpuError(
                f"this job uses {count} GPUs, but there are {len(gpus)} ({', '.join(gpus) or 'none'}); set "
                "distributed.processes to the number of GPUs, or CUDA_VISIBLE_DEVICES to the GPUs to use"
            )
        taken = take(count, gpus, locks())
        if taken is None:
            print(f"waiting for {count} of the GPUs {', '.join(gpus)}", file=sys.stderr, flush=True)
        while taken is None:
            time.sleep(1)
            taken = take(count, gpus, locks())
        for _, descriptor in taken:
            os.set_inheritable(descriptor, True)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for gpu, _ in taken)
        print(f"on GPU {os.environ['CUDA_VISIBLE_DEVICES']}", file=sys.stderr, flush=True)
    check_gpus(arguments.bfloat16, 1e9 * arguments.gigabytes)
    os.execvp(command[0], command)


if __name__ == "__main__":
    try:
        main()
    except GpuError as error:
        sys.exit(f"error: {error}")
