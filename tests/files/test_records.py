"""Records of files, and whether a file is still as recorded."""

import os
from pathlib import Path

import pytest

from workflow_scripts.files.records import ProvenanceError, check_file, checked_raw_file, file_record


def test_an_untouched_file_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first")
    record, times = file_record(path), path.stat()
    path.write_text("worst")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    # Size and time as recorded are taken for the content as recorded.
    assert check_file(path, record, tmp_path / "record.json") == record["sha256"]
    os.utime(path, (1, 1))
    with pytest.raises(ProvenanceError, match=r"a\.txt is not what its stage wrote \(see .*record\.json\)"):
        check_file(path, record, tmp_path / "record.json")


@pytest.mark.parametrize(("folder", "advice"), [("f00d", "delete both"), ("../mine", "restore it, or delete")])
def test_a_file_of_the_user_is_not_to_be_deleted(tmp_path: Path, folder: str, advice: str) -> None:
    dataset = tmp_path / "downloads" / "dataset.json"
    raw = dataset.parent / folder / "train.json"
    raw.parent.mkdir(parents=True)
    raw.write_text("as recorded")
    record = {"folder": folder, "files": {"train.json": file_record(raw)}}
    assert checked_raw_file("train.json", record, dataset).samefile(raw)
    raw.write_text("as it is now")
    with pytest.raises(ProvenanceError, match=rf"train\.json is not .*{advice}"):
        checked_raw_file("train.json", record, dataset)
