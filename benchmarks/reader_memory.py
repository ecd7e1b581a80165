"""Time and peak memory of reading and selecting annotations of the published size: all of HPDv2 and ImageRewardDB.

python -m benchmarks.reader_memory

The annotations are made up, there are no images. The stages run as the workflow runs them, each in its own process.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tabulate import tabulate

from workflow_scripts.configuration import Dataset, load
from workflow_scripts.preferences.synthetic_layouts import METADATA
from workflow_scripts.provenance import ROOT, described, sidecar_path, write_json
from workflow_scripts.stage_configuration import ReadAnnotations, SelectSubset, StageConfig

HPDV2_PROMPTS = 107_515  # x 6 = 645,090 pairs, x 4 = 430,060 images
IMAGEREWARD_PROMPTS = 8_000  # x 6 = 48,000 images
TEST_PROMPTS = 466


def words(rng: random.Random) -> str:
    """Return a prompt of the usual length."""
    return " ".join(f"{rng.getrandbits(24):x}" for _ in range(rng.randint(5, 40)))


def hpdv2_train_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows of train.json."""
    for prompt in range(HPDV2_PROMPTS):
        text, names = words(rng), [f"{4 * prompt + i:08d}.jpg" for i in range(4)]
        for a, b in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
            yield {"prompt": text, "image_path": [names[a], names[b]], "human_preference": [0, 1]}


def hpdv2_test_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows of test.json."""
    for prompt in range(400):
        ranks = list(range(9))
        raw = [{"annotation": ranks, "user_hash": f"{i}"} for i in range(10)]
        names = [f"{9 * prompt + i:08d}.jpg" for i in ranks]
        yield {"prompt": words(rng), "image_path": names, "rank": ranks, "raw_annotations": raw}


def imagereward_rows(rng: random.Random, split: str, prompts: int) -> Iterator[dict[str, Any]]:
    """Rows of metadata-{split}.parquet."""
    for prompt in range(prompts):
        text = words(rng)
        for image in range(6):
            yield {
                "image_path": f"images/{split}/{split}_{prompt // 250 + 1}/{split}-{prompt}-{image}.webp",
                "prompt_id": f"{prompt:06d}-{len(split):04d}",
                "prompt": text,
                "classification": "People",
                "image_amount_in_total": 6,
                "rank": 1 + image % 5,
                "overall_rating": 4,
                "image_text_alignment_rating": 4,
                "fidelity_rating": 4,
            }


def write_json_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write a JSON list row by row."""
    with path.open("w") as file:
        file.write("[" + json.dumps(next(rows)))
        file.writelines("," + json.dumps(row) for row in rows)
        file.write("]")


def write_record(folder: Path, archives: list[str]) -> Path:
    """Write dataset.json with its sidecar; the archives are named but do not exist."""
    files = {path.name: described(path) for path in sorted(folder.iterdir())}
    record = folder / "dataset.json"
    write_json(record, {"files": files | dict.fromkeys(archives)})
    write_json(sidecar_path(record), {"outputs": {record.name: described(record)}, "mlflow_run_id": None})
    return record


def run(stage: str, config: StageConfig, **files: Path) -> tuple[float, int]:
    """Run a stage; return its seconds and peak memory in MB, both of the whole process."""
    command = [sys.executable, "-m", f"workflow_scripts.{stage}", "--config", config.canonical()]
    command += [word for name, path in files.items() for word in (f"--{name}", str(path))]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    sidecar = json.loads(sidecar_path(files["output"]).read_text())
    return sidecar["seconds"], sidecar["peak_memory_megabytes"]


def main() -> None:
    """Write the annotations, run the stages, print the table."""
    rng = random.Random(0)
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        folders: dict[Dataset, Path] = {"imagereward": Path(temporary) / "ir", "hpsv2": Path(temporary) / "hp"}
        for folder in folders.values():
            folder.mkdir()
        write_json_rows(folders["hpsv2"] / "train.json", hpdv2_train_rows(rng))
        write_json_rows(folders["hpsv2"] / "test.json", hpdv2_test_rows(rng))
        for split, prompts in {"train": IMAGEREWARD_PROMPTS, "test": TEST_PROMPTS}.items():
            rows = pa.Table.from_pylist(list(imagereward_rows(rng, split, prompts)), METADATA)
            pq.write_table(rows, folders["imagereward"] / f"metadata-{split}.parquet")
        for dataset, folder in folders.items():
            record = write_record(folder, [f"images/{s}/{s}_{i}.zip" for s in ("train", "test") for i in range(1, 33)])
            train, test = folder / "train.parquet", folder / "test.parquet"
            run("read_annotations", ReadAnnotations.of(load({}), dataset, "test"), record=record, output=test)
            measured = run(
                "read_annotations", ReadAnnotations.of(load({}), dataset, "train"), record=record, output=train
            )
            table.append([f"read_annotations {dataset} train", *measured])
            for by in ("prompt", "pair") if dataset == "hpsv2" else ("prompt",):
                c = load({"datasets": {dataset: {"train_fraction": 0.25, "subsample_by": by}}})
                inputs = {"preferences": train, "test_preferences": test, "output": folder / "subset.parquet"}
                table.append(
                    [
                        f"select_subset {dataset} by {by}",
                        *run("select_subset", SelectSubset.of(c, dataset, "train"), **inputs),
                    ]
                )
    print(tabulate(table, headers=["stage", "seconds", "peak MB"]))


if __name__ == "__main__":
    main()
