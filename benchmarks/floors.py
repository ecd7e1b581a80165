"""Compare rollouts, a GRPO step and the bootstrap with a floor: the same arithmetic and memory traffic alone.

python -m benchmarks.floors

The planner counts the floor, at the rates of matrix products and memory reads measured on the same core. A second rate,
of products with the sizes of a decoding step, shows the effect of small matrices. The GRPO step is the one of
results/grpo_step.csv, measured on the same machine.
"""

import csv
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import credits
from benchmarks.measuring import RESULTS, cost, write_rows
from benchmarks.rollouts import ROLLOUTS, SCALES, Decoded, cases
from workflow_scripts.configuration.model import Configuration, Sampling
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.planning.architecture import architecture_of
from workflow_scripts.planning.costs import Length as Completions
from workflow_scripts.planning.costs import decoding_flops, decoding_seconds, product_seconds
from workflow_scripts.planning.devices import Assumptions, Gpu, this_cpu
from workflow_scripts.planning.memory import Model
from workflow_scripts.planning.plan import plan
from workflow_scripts.planning.tokens import Reader
from workflow_scripts.policy.loading import Policy, load_policy
from workflow_scripts.policy.prompts import messages
from workflow_scripts.preferences.images import in_memory
from workflow_scripts.rollouts.items import Item
from workflow_scripts.rollouts.transformers_engine import generate
from workflow_scripts.scoring.bootstrap import accuracy_intervals

IDEAL = Assumptions(flops_used=1, bandwidth_used=1, kernel_microseconds=0)
MEASURED = 3  # runs of each case


def rate_of_products(rows: int, inputs: int, outputs: int) -> float:
    """Measure FLOP/s of a product of a (rows, inputs) with an (inputs, outputs) matrix."""
    states, weights = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    repeats = max(10, int(2e9 / (2 * rows * inputs * outputs)))
    torch.nn.functional.linear(states, weights)
    started = time.process_time()
    for _ in range(repeats):
        torch.nn.functional.linear(states, weights)
    return repeats * 2 * rows * inputs * outputs / (time.process_time() - started)


def rollouts(cpu: Gpu) -> list[dict[str, Any]]:
    """Measure rollouts of the transformers engine for each policy, track and k."""
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for scale, track, manifest, c, batch_items, items, images in cases(Path(temporary), list(SCALES)):
            folder = Path(json.loads(manifest.read_text())["path"])
            config = ModelConfig.of(c, track)
            policy = load_policy(manifest, None, config)
            architecture = architecture_of(json.loads((folder / "config.json").read_text()))
            reader = Reader(architecture, policy.processor, policy.processor.image_processor)
            for k in ROLLOUTS:
                case = {"work": "rollouts", "case": f"{scale}, {track}, k = {k}"}
                found.append(case | rollouts_of(cpu, policy, config, reader, items, images, k, batch_items))
                print(found[-1], flush=True)
    return found


def rollouts_of(
    cpu: Gpu,
    policy: Policy,
    config: ModelConfig,
    reader: Reader,
    items: list[Item],
    images: Decoded,
    k: int,
    batch_items: int,
) -> dict[str, Any]:
    """Measure k rollouts of each item; the floor assumes questions and completions of mean length."""
    settings: Any = {"first_k": 0, "sampling": Sampling(), "batch_items": batch_items, "seed": "s"}
    lengths: list[int] = []

    def work() -> None:
        lengths[:] = [
            len(row["completion_ids"]) for row in generate(policy, items, in_memory(images), rollouts=k, **settings)
        ]

    spent = sorted(cost(work).cpu for _ in range(MEASURED))[MEASURED // 2]
    chats = [messages(policy.template, item.prompt) for item in items]
    texts = policy.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    architecture, lora = reader.architecture, Configuration().training.imagereward.lora
    seen = [reader.image(*images[name].size) for item in items for name in item.image_ids]
    asked = sum(map(len, policy.tokenizer(texts, add_special_tokens=False)["input_ids"])) - len(seen)
    question = (asked + sum(image.tokens for image in seen)) / len(items)
    prefill = sum(architecture.vision_flops(image) for image in seen)
    prefill += len(items) * (architecture.language_flops(question) + architecture.head_flops(1))
    model = Model(architecture, config.dtype, "sdpa", lora.rank, lora.target_modules)
    completion = Completions(sum(lengths) / len(lengths), max(lengths))
    decoding = len(lengths) * decoding_flops(model, question, completion.mean, adapted=False)
    batches = math.ceil(len(items) / batch_items)
    prompts = len(items) / batches
    rows = prompts * k * completion.mean / completion.longest  # on average
    slower = dataclasses.replace(cpu, flops=rate_of_products(round(rows), *architecture.layer["gate_proj"]))
    floor, own_sizes = (
        product_seconds(cpu, IDEAL, prefill)
        + batches * decoding_seconds(model, core, IDEAL, rows, prompts, question, completion, adapted=False)
        for core in (cpu, slower)
    )
    return {
        "cpu_seconds": round(spent, 3),
        "gigaflops": round((prefill + decoding) / 1e9, 2),
        "floor_seconds": round(floor, 3),
        "times_above": round(spent / floor, 1),
        "floor_at_own_sizes": round(own_sizes, 3),
    }


def grpo_steps(cpu: Gpu) -> list[dict[str, Any]]:
    """Compare a step of the default trainings with its floor."""
    c = Configuration()
    stages = {stage.name: stage for stage in plan(c, cpu, IDEAL).stages}
    with (RESULTS / "grpo_step.csv").open(newline="") as file:
        default = {"policy": "bundled", "threads": "1", "contestant": "both"}
        measured = [row for row in csv.DictReader(file) if default.items() <= row.items()]
    found = []
    for row in measured:
        steps = getattr(c.training, row["track"]).steps
        parts = stages[f"train_grpo {row['track']}"].costs
        shares = {part: parts[part] for part in ("generation", "reference", "update")}
        spent, floor = float(row["cpu_seconds"]), sum(one.seconds for one in shares.values()) / steps
        found.append(
            {
                "work": "GRPO step",
                "case": row["track"],
                "cpu_seconds": spent,
                "gigaflops": round(sum(one.flops for one in shares.values()) / steps / 1e9, 2),
                "floor_seconds": round(floor, 3),
                "times_above": round(spent / floor, 1),
                "floor_at_own_sizes": "",
            }
        )
        print(found[-1], flush=True)
    return found


def bootstrap(cpu: Gpu) -> dict[str, Any]:
    """Measure 10,000 resamples of 2,000 prompts; the floor writes and reads the draws and reads two values for each."""
    resamples, prompts = 10_000, 2000
    own = credits(prompts, 15_300)
    spent = sorted(cost(lambda: accuracy_intervals([own], "micro", 0.95, resamples, 0)).cpu for _ in range(MEASURED))
    moved = resamples * prompts * (2 * 8 + 2 * 8)
    floor = moved / cpu.bandwidth
    row = {"work": "bootstrap", "case": "10,000 x 15,300 pairs", "cpu_seconds": round(spent[MEASURED // 2], 3)}
    row |= {"gigaflops": "", "floor_seconds": round(floor, 3), "times_above": round(spent[MEASURED // 2] / floor, 1)}
    return row | {"floor_at_own_sizes": ""}


def main() -> None:
    """Measure all cases and write results/floors.csv."""
    cpu = this_cpu(1)
    rates = {"work": "this core", "case": f"{cpu.flops / 1e9:.0f} GFLOP/s, {cpu.bandwidth / 1e9:.1f} GB/s read"}
    rows = rollouts(cpu) + grpo_steps(cpu) + [bootstrap(cpu)]
    write_rows("floors", [dict.fromkeys(rows[0], "") | rates, *rows])


if __name__ == "__main__":
    main()
