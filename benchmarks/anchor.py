"""Compare cost and accuracy of anchor ranking (N-1 comparisons) and a round robin (N(N-1)/2 comparisons).

python -m benchmarks.anchor        # after `make table1`

The score of an image is the mean probability of being preferred over all its comparisons. With an anchor each other
image has one comparison, and the anchor scores 0.5. Each comparison has one rollout.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import cost, write_rows
from workflow_scripts.configuration.model import Configuration, Sampling
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.files.paths import ROOT
from workflow_scripts.policy.loading import load_policy
from workflow_scripts.policy.prompts import ANSWERS
from workflow_scripts.preferences.images import decoded, in_memory
from workflow_scripts.preferences.schema import SUBSET, read_image_rows, read_table
from workflow_scripts.rollouts.items import Item, anchor_items, stable_random
from workflow_scripts.rollouts.transformers_engine import generate
from workflow_scripts.scoring.bootstrap import accuracy_intervals
from workflow_scripts.scoring.pair_accuracy import expected_answer
from workflow_scripts.scoring.protocols import prompt_credit

PROMPTS = 100


def round_robin(rows: list[dict[str, Any]]) -> list[Item]:
    """Return every pair of images of each prompt, shown in random order."""
    items = []
    for row in rows:
        for pair in itertools.combinations(row["image_ids"], 2):
            shown = pair[::-1] if stable_random("order", *pair) % 2 else pair
            items.append(Item(row["prompt_id"], row["prompt"], shown, shown[1], shown[0]))
    return items


def main() -> None:
    """Run both comparisons and write results/anchor.csv."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    results = parser.parse_args().results
    test = results / "datasets/hpsv2/test"
    prompts = read_table(test / "subset.parquet", SUBSET).to_pylist()[:PROMPTS]
    images = {row["image_id"]: decoded(row["bytes"]) for row in read_image_rows([test / "images-0000.parquet"])}
    prompts = [row for row in prompts if set(row["image_ids"]) <= set(images)]
    config = ModelConfig.of(Configuration(), "hpsv2")
    policy = load_policy(results / "policies/base/manifest.json", results / "policies/hpsv2/seed0", config)
    answers = ANSWERS["pairwise"]
    rows = []
    asked = {"anchor": anchor_items(prompts, set(images), 0, both_orders=False), "round robin": round_robin(prompts)}
    for name, items in asked.items():
        found: dict[tuple[str, str], list[float]] = {}

        def work(items: list[Item] = items, found: dict[tuple[str, str], list[float]] = found) -> None:
            settings: Any = {"rollouts": 1, "first_k": 0, "sampling": Sampling(), "batch_items": 64, "seed": "s"}
            shown = {item.item_id: item.image_ids for item in items}
            for rollout in generate(policy, items, in_memory(images), **settings):
                second = float(expected_answer(rollout["answer_logprobs"], answers))
                for image, preferred in zip(shown[rollout["item_id"]], (1 - second, second), strict=True):
                    found.setdefault((rollout["prompt_id"], image), []).append(preferred)

        spent = cost(work)
        if name == "anchor":  # it scores 0.5, whatever its comparisons say
            found |= {(item.prompt_id, str(item.anchor)): [0.5] for item in items}
        scores = [[[np.mean(found[row["prompt_id"], image])] for image in row["image_ids"]] for row in prompts]
        rules: Any = {"k": 1, "tie": "wrong", "label_tie": "dropped", "missing": "wrong", "neutral": 0.5}
        credit = prompt_credit(scores, [row["ranks"] for row in prompts], **rules)
        (accuracy,) = accuracy_intervals([credit], "micro", 0.95, 10_000, 0)
        rows.append(
            {
                "comparisons": name,
                "prompts": len(prompts),
                "asked": len(items),
                "cpu_seconds": round(spent.cpu, 2),
                "accuracy_percent": round(100 * accuracy.estimate, 1),
                "standard_error": round(100 * accuracy.standard_error, 1),
            }
        )
        print(rows[-1], flush=True)
    write_rows("anchor", rows)


if __name__ == "__main__":
    main()
