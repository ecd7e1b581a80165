"""What else might make rollouts faster: bfloat16, torch.compile, two workers of one thread, continuous batching.

python -m benchmarks.alternatives

Each is measured against the transformers engine on the bundled policy, k = 3, as `benchmarks.rollouts` asks it. The
continuous batching of transformers takes token sequences alone: it is measured on questions without their images,
against `generate` and against the engine's loop, all of which decode equally many tokens. torch.compile needs a C++
compiler; compiling is not in its figures, but in the round that warms up.
"""

import argparse
import copy
import dataclasses
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.measuring import ROUNDS, contest, write_rows
from benchmarks.rollouts import TRACKS, cases, engine
from workflow_scripts.configuration.model import Sampling
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.policy.loading import Policy, load_policy
from workflow_scripts.policy.prompts import messages
from workflow_scripts.rollouts.decoding import sample_completions
from workflow_scripts.rollouts.items import Item
from workflow_scripts.rollouts.transformers_engine import generate

ROLLOUTS = 3
TOKENS = 24  # of a completion that a text question gets
WORKER: dict[str, Any] = {}  # of a worker process: its policy and what it is asked


def compiled(policy: Policy) -> Policy:
    """A copy whose norms and feed-forward layers are compiled, which are most of its small operations."""
    other = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    for layer in other.model.base_model.language_model.layers:
        for module in (layer.input_layernorm, layer.mlp, layer.post_attention_layernorm):
            module.compile(dynamic=True)
    return other


def in_bfloat16(policy: Policy) -> Policy:
    """A copy whose weights are bfloat16."""
    return dataclasses.replace(policy, model=copy.deepcopy(policy.model).to(torch.bfloat16))


def start_worker(case: tuple[Any, ...]) -> None:
    """Load the policy once for all rounds."""
    manifest, config, items, images, batch_items = case
    torch.set_num_threads(1)
    WORKER["work"] = partial(engine, generate, load_policy(manifest, None, config))
    WORKER["asked"] = (items, images, ROLLOUTS, batch_items, Sampling())


def work_on_half(half: int) -> int:
    """Roll out every second item; returns how many scores."""
    items, *others = WORKER["asked"]
    return len(WORKER["work"](items[half::2], *others))


def text_only(policy: Policy, items: Sequence[Item]) -> dict[str, Callable[[], object]]:
    """Decoding of equally many tokens from the questions without their images."""
    tokenizer: Any = policy.tokenizer
    template = policy.template.replace("{image}", "")
    chats = [messages(template, item.prompt) for item in items]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    asked = [ids[mask == 1].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    settings = GenerationConfig(
        do_sample=True,
        max_new_tokens=TOKENS,
        num_return_sequences=ROLLOUTS,
        eos_token_id=-1,  # no completion ends before it is that long
        pad_token_id=tokenizer.pad_token_id,
    )
    batching: Any = policy.model
    return {
        "generate, text": lambda: batching.generate(**inputs, generation_config=settings),
        "the engine's loop, text": lambda: sample_completions(batching, inputs, ROLLOUTS, Sampling(), TOKENS, []),
        "continuous batching, text": lambda: batching.generate_batch(asked, generation_config=settings),
    }


def two_threads(policy: Policy, asked: Any) -> None:
    """Rollouts of all items by this process, on two threads."""
    torch.set_num_threads(2)
    engine(generate, policy, *asked)


def main() -> None:
    """Measure, and write results/alternatives.csv."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for _, track, manifest, c, batch_items, items, images in cases(Path(temporary), ["bundled"]):
            config = ModelConfig.of(c, track)
            policy = load_policy(manifest, None, config)
            asked: Any = (items, images, ROLLOUTS, batch_items, Sampling())
            torch.set_num_threads(1)
            kinds = {"float32": policy, "bfloat16": in_bfloat16(policy), "compiled": compiled(policy)}
            case = (manifest, config, items, images, batch_items)
            with multiprocessing.get_context("spawn").Pool(2, start_worker, (case,)) as pool:
                contests: dict[str, dict[str, Callable[[], object]]] = {
                    "numbers": {name: partial(engine, generate, kind, *asked) for name, kind in kinds.items()},
                    "workers": {
                        "a process of two threads": partial(two_threads, policy, asked),
                        "two of one thread": partial(pool.map, work_on_half, [0, 1], 1),
                    },
                }
                if track == TRACKS[0]:
                    contests["text"] = text_only(policy, items)
                for about, works in contests.items():
                    for row in contest(works, rounds):
                        if about == "workers":  # whose CPU seconds are not those of this process
                            row |= {"cpu_seconds": "", "speedup_cpu": ""}
                        found.append({"about": about, "track": track, **row})
                        print(found[-1], flush=True)
    write_rows("alternatives", found)


if __name__ == "__main__":
    main()
