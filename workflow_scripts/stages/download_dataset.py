"""Download ImageRewardDB or HPDv2 from the Hugging Face Hub: only the files that are read.

python -m workflow_scripts.stages.download_dataset --record results/downloads/hub/hpsv2/dataset.json \
    --config '{"dataset": "hpsv2", "hub": {"repository": "ymhao/HPDv2", "revision": "main"}}'

The output is the record of the data set. The raw files stand beside it in a folder named by the commit, or stay in
place: in the folder that `hub.path` names, or in the cache of the Hub's client. An interrupted download resumes.
"""

from pathlib import Path

from workflow_scripts.configuration.data_stages import DownloadDataset
from workflow_scripts.configuration.model import Hpdv2Hub, ImageRewardHub
from workflow_scripts.files.records import file_record
from workflow_scripts.files.writing import write_json
from workflow_scripts.preferences.hub import HubError, fetch
from workflow_scripts.running.command_line import Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage

# As in ImageRewardDB.py on the Hub: training archives for each thousand prompts, from the first on.
ARCHIVES_OF_A_THOUSAND = 4
OTHER_ARCHIVES = {"validation": 2, "test": 2}


class Arguments(StageArguments):
    """Download ImageRewardDB or HPDv2 from the Hugging Face Hub: only the files that are read."""

    record: Output
    """dataset.json: repository, commit, and the digest of every raw file."""
    config: DownloadDataset
    """Data set, and where it is published."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    with run_stage(arguments) as run:
        hub, dataset = arguments.config.hub, arguments.config.dataset
        names, beside, key = needed_files(hub), arguments.record.parent, f"datasets.{dataset}.hub"
        if hub.path:
            folder, repository, commit = Path(hub.path).expanduser().resolve(), None, None
            files = {name: file_record(published_file(folder, name, key)) for name in names}
        else:
            folder, repository, commit, files = fetch("dataset", hub.repository, hub.revision, names, beside, key)
        record = {
            "dataset": dataset,
            "source": "hub",
            "repository": repository,
            "revision": commit,
            "train_set": getattr(hub, "train_set", None),
            "folder": str(folder.relative_to(beside) if folder.is_relative_to(beside) else folder),
            "files": files,
        }
        write_json(arguments.record, record)
        run.metrics({"files": len(files), "bytes": sum(file["bytes"] for file in files.values())})


def needed_files(hub: ImageRewardHub | Hpdv2Hub) -> list[str]:
    """List the published files that are read, relative to the repository."""
    if isinstance(hub, Hpdv2Hub):
        splits = ["test"] if hub.test_only else ["train", "test"]
        return [f"{split}.{kind}" for split in splits for kind in ("json", "tar.gz")]
    archives = {"train": ARCHIVES_OF_A_THOUSAND * int(hub.train_set.removesuffix("k")), **OTHER_ARCHIVES}
    if hub.test_only:
        archives = {"test": OTHER_ARCHIVES["test"]}
    zips = [f"images/{split}/{split}_{i}.zip" for split, number in archives.items() for i in range(1, number + 1)]
    return [f"metadata-{split}.parquet" for split in archives] + zips


def published_file(folder: Path, name: str, key: str) -> Path:
    """Find a published file in the user's folder.

    Raises:
        HubError: it is missing.
    """
    if not (folder / name).is_file():
        raise HubError(
            f"{folder / name} is missing; {key}.path must be a folder with the files as they are published, archives "
            f"not unpacked{' (fewer of them with a smaller train_set)' if 'train_' in name else ''}"
        )
    return folder / name


if __name__ == "__main__":
    main()
