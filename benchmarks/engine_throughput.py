"""Throughput of both engines on the bundled policy, one after the other in one process: in vLLM's environment, on CPU.

.venv-vllm/bin/python -m benchmarks.engine_throughput --csv engine_throughput.csv

One numeric thread each. Seconds are those of the processor, which other jobs on the machine hardly lengthen; loading
and the first batch are not counted.
"""

import argparse
import csv
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from PIL import Image

from workflow_scripts.configuration import Configuration, Policy, RolloutsVllm, Sampling, Track
from workflow_scripts.policy.loading import load_policy
from workflow_scripts.policy.manifest import model_files
from workflow_scripts.preferences.synthetic_scenes import draw, sample_prompt, sample_scene
from workflow_scripts.provenance import ROOT, write_json
from workflow_scripts.rollouts import transformers_engine, vllm_engine
from workflow_scripts.rollouts.items import Item, anchor_items, pointwise_items
from workflow_scripts.stage_configuration import ModelConfig

TRACKS: tuple[Track, ...] = ("imagereward", "hpsv2")


def questions(prompts: int) -> tuple[dict[Track, list[Item]], dict[str, Image.Image]]:
    """Items of each track about four synthetic images of each prompt, and the images."""
    rng = random.Random("throughput")
    rows: list[dict[str, Any]] = []
    images: dict[str, Image.Image] = {}
    for number in range(prompts):
        asked, background = sample_prompt(rng, test=True)
        scenes = [sample_scene(rng, asked, background) for _ in range(4)]
        names = [f"{number}-{i}" for i in range(4)]
        rows.append({"prompt_id": f"p{number}", "prompt": scenes[0].prompt, "image_ids": names})
        images |= zip(names, map(draw, scenes), strict=True)
    return {
        "imagereward": pointwise_items(rows, set(images)),
        "hpsv2": anchor_items(rows, set(images), 0, False),
    }, images


def measure(generate: Any, policy: Any, items: list[Item], images: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Rollouts and tokens for each second of the processor."""
    list(generate(policy, items[: options["batch_items"]], images, **options))
    wall, cpu = time.perf_counter(), time.process_time()
    rows = list(generate(policy, items, images, **options))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = sum(len(row["completion_ids"]) for row in rows)
    return {
        "rollouts": len(rows),
        "tokens": tokens,
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 2),
        "rollouts_per_cpu_second": round(len(rows) / cpu, 1),
        "tokens_per_cpu_second": round(tokens / cpu),
    }


def main() -> None:
    """Measure, print a Markdown table, write the CSV file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64, help="with four images each")
    parser.add_argument("--rollouts", type=int, default=3, help="of each item")
    parser.add_argument("--policy", default="models/tiny-qwen2.5-vl", help="folder, relative to the repository")
    parser.add_argument("--csv", type=Path, help="file to write")
    arguments = parser.parse_args()
    by_track, images = questions(arguments.prompts)
    options = {"rollouts": arguments.rollouts, "first_k": 0, "sampling": Sampling(), "batch_items": 64, "seed": "s"}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.json"
        write_json(manifest, {"path": arguments.policy, "files": model_files(ROOT / arguments.policy)})
        for track in TRACKS:
            config = ModelConfig.of(Configuration(policy=Policy(bundled=arguments.policy)), track)
            model = load_policy(manifest, None, config)
            vllm = vllm_engine.load_into_vllm(manifest, None, config, RolloutsVllm())
            for name, generate, policy in (
                ("transformers", transformers_engine.generate, model),
                ("vllm", vllm_engine.generate, vllm),
            ):
                row = {"track": track, "engine": name} | measure(generate, policy, by_track[track], images, options)
                print(json.dumps(row), flush=True)
                found.append(row)
    print("|", " | ".join(found[0]), "|\n|", " | ".join("---" for _ in found[0]), "|")
    for row in found:
        print("|", " | ".join(map(str, row.values())), "|")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
