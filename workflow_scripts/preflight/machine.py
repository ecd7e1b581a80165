"""Whether this machine can run a configuration: GPUs and disk. Without torch, so that a workflow starts fast."""

import shutil
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from workflow_scripts.configuration import jobs
from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.published import download_sizes
from workflow_scripts.running.gpus import Gpu, GpuError, check_gpus, visible_names
from workflow_scripts.running.take_gpus import locks, occupied


class DiskError(RuntimeError):
    """The disk has no room for what a run downloads: names the folder, both numbers and the remedy."""


def check_run(c: Configuration, rules: Collection[str]) -> list[Gpu]:
    """Check GPUs and disk for jobs of these rules, if one of them uses a GPU.

    Returns:
        The GPUs that they may use.

    Raises:
        GpuError: the GPUs cannot run the jobs.
        DiskError: there is no room for the downloads that are still to come.
    """
    using = {rule: jobs.gpus(c, rule) for rule in rules if jobs.gpus(c, rule)}
    if not using:
        return []
    memory = max(jobs.memory_on_each_gpu(c, rule) for rule in using)
    found = check_gpus(c.policy.dtype == "bfloat16", memory, occupied(visible_names(), locks()))
    if found and max(using.values()) > len(found):
        raise GpuError(
            f"a job uses {max(using.values())} GPUs, but there are {len(found)}; set distributed.processes and "
            "rollouts.vllm.tensor_parallel_size to the number of GPUs"
        )
    check_disk(c)
    return found


def check_disk(c: Configuration) -> None:
    """Check that downloads that are still to come fit on their disks.

    Raises:
        DiskError: they do not; what is made of them needs room beside them (the command `plan` says how much).
    """
    needed: dict[int, float] = defaultdict(float)
    folders: dict[int, Path] = {}
    for folder, size in downloads_to_come(c).items():
        there = existing(folder)
        present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        needed[there.stat().st_dev] += max(0.0, size - present)
        folders[there.stat().st_dev] = there
    for device, size in needed.items():
        free = shutil.disk_usage(folders[device]).free
        if size > free:
            raise DiskError(
                f"{folders[device]} has {free / 1e9:.1f} GB free, and {size / 1e9:.1f} GB are still to be downloaded "
                "there; free some, or set `downloads` and HF_HOME to folders on a larger disk"
            )


def existing(folder: Path) -> Path:
    """Return a folder, or the first of those above it that is there, and so is on its disk."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def downloads_to_come(c: Configuration) -> dict[Path, float]:
    """Published bytes by the folder that they are downloaded to, without what a finished stage has recorded."""
    found: dict[Path, float] = {}
    for dataset in dict.fromkeys([*c.tracks, *(cross.test for cross in c.cross_tests)]):
        data, folder = getattr(c.datasets, dataset), Path(c.downloads) / "hub" / dataset
        if data.source == "hub" and not data.hub.path and not (folder / "dataset.json").is_file():
            found[folder] = sum(download_sizes(dataset, data.hub).values())
    hub = c.policy.hub
    if c.policy.source == "hub" and not hub.path and not (Path(c.results) / "policies/base/manifest.json").is_file():
        found[Path(HF_HUB_CACHE) / f"models--{hub.repository.replace('/', '--')}"] = jobs.weights_bytes(c)
    return found
