"""Locks: one process makes a result, one workflow writes to a results folder.

The kernel keeps the locks (flock), so a lock ends with the process that holds it, however that ends. A killed process
leaves a hidden file behind that locks nothing.
"""

import os
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout


class LockedError(RuntimeError):
    """Another process holds the lock: names the result, the process where it is known, and the remedy."""


class Lock:
    """Exclusive right of one process to do something; a second process is refused at once."""

    def __init__(self, path: Path, refusal: str) -> None:
        """`path` is the lock file; `refusal` is the message to a second process, with the remedy."""
        self.path = path
        self.refusal = refusal
        self._lock = FileLock(path, thread_local=False)

    @classmethod
    def of_output(cls, output: Path) -> Self:
        """Lock for making a file."""
        return cls(
            output.with_name(f".{output.name}.lock"),
            f"{output} is being made by another process; wait for it or end it, then run snakemake again",
        )

    @classmethod
    def of_results(cls, folder: Path) -> Self:
        """Lock for running the workflow on a results folder."""
        return cls(
            folder / ".workflow.lock",
            f"another workflow is writing to {folder.resolve()}; wait for it or end it, or set `results` to another "
            "folder",
        )

    def acquire(self) -> None:
        """Take the lock, and write the holder into its file.

        Raises:
            LockedError: another process holds it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise LockedError(f"{self.refusal} ({self._holder()})") from None
        self.path.write_text(f"process {os.getpid()} on {os.uname().nodename}\n", encoding="utf-8")

    def release(self) -> None:
        """Remove the lock file, then release it: in this order, nobody locks a file that is about to vanish."""
        self.path.unlink(missing_ok=True)
        self._lock.release()

    def _holder(self) -> str:
        try:
            written = self.path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:  # it was released a moment ago
            written = ""
        return written or "process unknown"

    def __enter__(self) -> Self:
        """Take the lock."""
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self.release()
