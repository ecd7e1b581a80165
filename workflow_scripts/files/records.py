"""Records of files: digest, size and modification time, and whether a file is still as recorded."""

from pathlib import Path
from typing import Any

from workflow_scripts.files.digests import file_digest


class ProvenanceError(RuntimeError):
    """A file does not match its sidecar, or has none: names the file and the remedy."""


def file_record(path: Path) -> dict[str, Any]:
    """Digest, size and modification time of a file."""
    status = path.stat()
    return {"sha256": file_digest(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def check_file(path: Path, record: dict[str, Any], recorded_in: Path) -> str:
    """Digest of a file, checked against its record (unread where size and modification time are as recorded).

    Raises:
        ProvenanceError: the file is missing, or its content differs from the record.
    """
    if not path.is_file():
        raise ProvenanceError(
            f"{path} is missing (see {recorded_in}); delete {recorded_in} and run snakemake again to make both anew"
        )
    status = path.stat()
    if (status.st_size, status.st_mtime_ns) != (record["bytes"], record["mtime_ns"]) and (
        status.st_size != record["bytes"] or file_digest(path) != record["sha256"]
    ):
        raise ProvenanceError(
            f"{path} is not what its stage wrote (see {recorded_in}); "
            "delete both and run snakemake again to make them anew"
        )
    return str(record["sha256"])


def raw_folder(record: dict[str, Any], recorded_in: Path) -> Path:
    """Folder of a data set's raw files: that of its record (dataset.json), unless it names another."""
    return recorded_in.parent / record.get("folder", "")


def checked_raw_file(name: str, record: dict[str, Any], recorded_in: Path) -> Path:
    """Path of a data set's raw file, unchanged since its record (dataset.json) was written.

    Files below the record's folder are the workflow's, those elsewhere the user's: these are not to be deleted.

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
