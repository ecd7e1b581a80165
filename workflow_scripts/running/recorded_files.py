"""Whether the files that a record names, of a data set or a base policy, are still what was recorded."""

import json
from pathlib import Path

from workflow_scripts.files.digests import file_digest
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.records import raw_folder

RECORDS = ("dataset.json", "manifest.json")


def altered_files(recorded_in: Path) -> list[str]:
    """Describe each file of a record that is missing or has other content now.

    Args:
        recorded_in: dataset.json, or manifest.json of a base policy.
    """
    record = json.loads(recorded_in.read_text(encoding="utf-8"))
    folder = ROOT / record["path"] if "path" in record else raw_folder(record, recorded_in)
    files = {folder / name: recorded for name, recorded in record["files"].items()}
    if adapter := record.get("adapter"):
        files |= {ROOT / adapter["path"] / name: recorded for name, recorded in adapter["files"].items()}
    found = []
    for path, recorded in files.items():
        sha256 = recorded if isinstance(recorded, str) else recorded["sha256"]
        if not path.is_file():
            found.append(f"{path}, which it names, is missing")
        elif file_digest(path) != sha256:
            found.append(f"{path}, which it names, has changed since")
    return found
