"""Records of files (digest, size and modification time), and checks that files are still as recorded."""

from pathlib import Path
from typing import Any

from workflow_scripts.files.digests import file_digest


class ProvenanceError(RuntimeError):
    """A file does not match its sidecar, or has none: names the file and the remedy."""


def file_record(path: Path) -> dict[str, Any]:
    """Record digest, size and modification time of a file."""
    status = path.stat()
    return {"sha256": file_digest(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def is_as_recorded(path: Path, record: dict[str, Any]) -> bool:
    """Tell whether a file has its recorded content; a file with its recorded size and modification time is not read.

    Nor is one of another size. A record that has no size and time is compared by digest.
    """
    status = path.stat()
    if status.st_size != record.get("bytes", status.st_size):
        return False
    return status.st_mtime_ns == record.get("mtime_ns") or file_digest(path) == str(record["sha256"])


def check_file(path: Path, record: dict[str, Any], recorded_in: Path) -> str:
    """Check a file against its record as `is_as_recorded` does, and return its digest.

    Raises:
        ProvenanceError: the file is missing, or its content differs from the record.
    """
    if not path.is_file():
        raise ProvenanceError(
            f"{path} is missing (see {recorded_in}); delete {recorded_in} and run snakemake again to make both anew"
        )
    if not is_as_recorded(path, record):
        raise ProvenanceError(
            f"{path} is not what its stage wrote (see {recorded_in}); "
            "delete both and run snakemake again to make them anew"
        )
    return str(record["sha256"])


def raw_folder(record: dict[str, Any], recorded_in: Path) -> Path:
    """Return the folder of the raw files of a data set: that of its record (dataset.json), or the one it names."""
    return recorded_in.parent / record.get("folder", "")


def checked_raw_file(name: str, record: dict[str, Any], recorded_in: Path) -> Path:
    """Check a raw file of a data set against the record (dataset.json), and return its path.

    The workflow made the files below the folder of the record. Others belong to the user, who must not delete them.

    Raises:
        ProvenanceError: it is missing or has changed.
    """
    path = raw_folder(record, recorded_in) / name
    try:
        check_file(path, record["files"][name], recorded_in)
    except ProvenanceError:
        if path.resolve().is_relative_to(recorded_in.parent.resolve()):
            raise
        raise ProvenanceError(
            f"{path} is not as it was when {recorded_in} was written; restore it, or delete {recorded_in} and run "
            "snakemake again to go on with the file as it is now"
        ) from None
    return path
