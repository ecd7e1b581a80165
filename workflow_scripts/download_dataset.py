"""Download ImageRewardDB or HPDv2 from the Hugging Face Hub: only the files that are read.

python -m workflow_scripts.download_dataset --output results/downloads/hpsv2/dataset.json \
    --config '{"dataset": "hpsv2", "hub": {"repository": "ymhao/HPDv2", "revision": "main"}}'

The output is the record of the data set; the raw files stand beside it. An interrupted download is taken up again.
"""

from huggingface_hub import HfApi

from workflow_scripts.command_line import Output, StageArguments
from workflow_scripts.configuration import Hpdv2Hub, ImageRewardHub
from workflow_scripts.provenance import ProvenanceError, described, write_json
from workflow_scripts.stage_configuration import DownloadDataset
from workflow_scripts.tracking import run_stage

IMAGEREWARD_ARCHIVES = {"validation": 2, "test": 2}  # of ImageRewardDB.py on the Hub; of train up to 32


class Arguments(StageArguments):
    """Download ImageRewardDB or HPDv2 from the Hugging Face Hub: only the files that are read."""

    output: Output
    """dataset.json: repository, commit, and the digest of every raw file beside it."""
    config: DownloadDataset
    """Which data set, and where it is published."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    with run_stage(arguments) as run:
        folder, hub = arguments.output.parent, arguments.config.hub
        files = needed_files(hub)
        api = HfApi()
        commit = api.dataset_info(hub.repository, revision=hub.revision).sha
        api.snapshot_download(
            hub.repository, repo_type="dataset", revision=commit, local_dir=folder, allow_patterns=files
        )
        checked = api.verify_repo_checksums(hub.repository, repo_type="dataset", revision=commit, local_dir=folder)
        damaged = {mismatch["path"] for mismatch in checked.mismatches}
        wrong = [name for name in files if name in damaged or not (folder / name).is_file()]
        if wrong:
            raise ProvenanceError(
                f"{hub.repository} at {commit}: {wrong} in {folder} are missing or differ from the Hub's checksums; "
                "delete them and run snakemake again, or check repository and revision"
            )
        record = {
            "dataset": arguments.config.dataset,
            "source": "hub",
            "repository": hub.repository,
            "revision": commit,
            "files": {name: described(folder / name) for name in files},
        }
        write_json(arguments.output, record)
        run.metrics({"files": len(files), "bytes": sum((folder / name).stat().st_size for name in files)})


def needed_files(hub: ImageRewardHub | Hpdv2Hub) -> list[str]:
    """Published files that are read, relative to the repository."""
    if isinstance(hub, Hpdv2Hub):
        return [f"{split}.{kind}" for split in ("train", "test") for kind in ("json", "tar.gz")]
    archives = {"train": hub.train_archives, **IMAGEREWARD_ARCHIVES}
    zips = [f"images/{split}/{split}_{i}.zip" for split, number in archives.items() for i in range(1, number + 1)]
    return [f"metadata-{split}.parquet" for split in archives] + zips


if __name__ == "__main__":
    main()
