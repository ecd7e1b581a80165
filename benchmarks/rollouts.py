"""Compare rollouts with soft scores: the transformers engine, plain `generate`, and vLLM.

python -m benchmarks.rollouts                                                       # without vLLM
.venv-vllm/bin/python -m benchmarks.rollouts --contestants plain transformers vllm  # in the vLLM environment, on CPU

There are two policies: the bundled one, and a Qwen2.5-VL with the Qwen vocabulary and 40 M random parameters outside
its embedding. Thoughts of the latter never end, so that all contestants generate equally many tokens. Greedy scores of
the first two contestants must agree.
"""

import argparse
import gc
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.measuring import contest, replace_rows
from tests.policy.qwen_vocabulary import processor as qwen_processor
from workflow_scripts.configuration.model import Configuration, RolloutsVllm, Sampling, Track
from workflow_scripts.configuration.model import Policy as PolicySettings
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.writing import write_json
from workflow_scripts.policy.loading import Policy, as_policy, load_model, load_policy, load_processor
from workflow_scripts.policy.manifest import model_files
from workflow_scripts.policy.prompts import CLOSE_THINKING, OPEN_ANSWER, messages
from workflow_scripts.preferences.images import in_memory
from workflow_scripts.preferences.synthetic_scenes import draw, sample_prompt, sample_scene
from workflow_scripts.rollouts import transformers_engine
from workflow_scripts.rollouts.items import Item, anchor_items, pointwise_items
from workflow_scripts.scoring.pair_accuracy import expected_answer

TRACKS: tuple[Track, ...] = ("imagereward", "hpsv2")
SIZES = ((84, 84), (112, 70), (70, 126), (168, 168), (60, 60))  # width and height of images
ROLLOUTS = (1, 3, 8)
Decoded = dict[str, Image.Image]  # images by name
BUNDLED = "models/tiny-qwen2.5-vl"
# Prompts with four images each, items per batch, largest image in pixels.
SCALES = {"bundled": (32, 64, 84 * 84), "larger": (1, 8, 168 * 168)}


def questions(prompts: int) -> tuple[dict[Track, list[Item]], dict[str, Image.Image]]:
    """Return items of each track for four synthetic images per prompt, and the images in mixed sizes."""
    rng = random.Random("throughput")
    rows: list[dict[str, Any]] = []
    images: dict[str, Image.Image] = {}
    for number in range(prompts):
        asked, background = sample_prompt(rng, test=True)
        scenes = [sample_scene(rng, asked, background) for _ in range(4)]
        names = [f"{number}-{i}" for i in range(4)]
        rows.append({"prompt_id": f"p{number}", "prompt": scenes[0].prompt, "image_ids": names})
        images |= {name: draw(scene).resize(rng.choice(SIZES)) for name, scene in zip(names, scenes, strict=True)}
    return {
        "imagereward": pointwise_items(rows, set(images)),
        "hpsv2": anchor_items(rows, set(images), 0, False),
    }, images


def write_larger_policy(folder: Path) -> None:
    """Write a Qwen2.5-VL with random weights, 40 M parameters outside its embedding and the Qwen vocabulary."""
    processor = qwen_processor(shortest_edge=28 * 28, longest_edge=SCALES["larger"][2])
    token_id = processor.tokenizer.convert_tokens_to_ids
    text: dict[str, Any] = {"vocab_size": 151936, "hidden_size": 512, "intermediate_size": 1536}
    text |= {"num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 2}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}}
    text |= {"eos_token_id": token_id("<|im_end|>"), "pad_token_id": token_id("<|endoftext|>"), "bos_token_id": None}
    vision = {"depth": 6, "hidden_size": 320, "intermediate_size": 1280, "num_heads": 8, "out_hidden_size": 512}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | {"fullatt_block_indexes": [2, 5]},
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=text["eos_token_id"], pad_token_id=text["pad_token_id"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.no_grad()
def plain(
    policy: Policy,
    items: list[Item],
    images: Decoded,
    rollouts: int,
    batch_items: int,
    sampling: Sampling,
) -> list[float]:
    """Score with `generate(num_return_sequences=k)` and a second forward pass for the answer logits.

    `policy` must be loaded by plain transformers.
    """
    model: Any = policy.model
    processor: Any = policy.processor
    answer_ids = torch.tensor(policy.answer_token_ids)
    opening = policy.tokenizer.encode(OPEN_ANSWER, add_special_tokens=False)
    budget = sampling.max_thinking_tokens + sampling.max_answer_tokens
    budget += len(policy.tokenizer.encode(CLOSE_THINKING + OPEN_ANSWER, add_special_tokens=False))
    scores = []
    for start in range(0, len(items), batch_items):
        batch = items[start : start + batch_items]
        chats = [messages(policy.template, item.prompt) for item in batch]
        inputs = processor(
            text=processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False),
            images=[[images[name] for name in item.image_ids] for item in batch],
            padding=True,
            return_tensors="pt",
        )
        ids = model.generate(
            **inputs,
            do_sample=sampling.temperature > 0,
            max_new_tokens=budget,
            num_return_sequences=rollouts,
        )
        length = inputs["input_ids"].shape[1]
        completions = ids[:, length:]
        padded = (completions == policy.tokenizer.pad_token_id).int().cumsum(-1).bool()
        again = {
            "input_ids": ids,
            "attention_mask": torch.cat([inputs["attention_mask"].repeat_interleave(rollouts, 0), (~padded).int()], 1),
        }
        # Each image once per rollout, in the order of the rows.
        shown = inputs["image_grid_thw"].prod(-1).tolist()
        per_item = len(batch[0].image_ids)
        pictures = inputs["pixel_values"].split([sum(shown[i : i + per_item]) for i in range(0, len(shown), per_item)])
        again["pixel_values"] = torch.cat([picture for picture in pictures for _ in range(rollouts)])
        grids = inputs["image_grid_thw"].view(len(batch), per_item, 3)
        again["image_grid_thw"] = grids.repeat_interleave(rollouts, 0).flatten(0, 1)
        again["mm_token_type_ids"] = torch.nn.functional.pad(
            inputs["mm_token_type_ids"].repeat_interleave(rollouts, 0), (0, completions.shape[1])
        )
        logits = model(**again, logits_to_keep=completions.shape[1] + 1).logits
        windows = completions.unfold(1, len(opening), 1)
        found = (windows == torch.tensor(opening)).all(-1)
        position = torch.where(found.any(-1), found.int().argmax(-1) + len(opening), completions.shape[1])
        chosen = logits[torch.arange(len(logits)), position][:, answer_ids].double().softmax(-1)
        scores += (chosen @ torch.tensor(policy.answers, dtype=torch.double)).tolist()
    return scores


def engine(
    generate: Callable[..., Any],
    policy: Policy,
    items: list[Item],
    images: Decoded,
    rollouts: int,
    batch_items: int,
    sampling: Sampling,
) -> list[float]:
    """Return the scores of one of the engines, in the order of the items."""
    rows = generate(
        policy,
        items,
        in_memory(images),
        rollouts=rollouts,
        first_k=0,
        sampling=sampling,
        batch_items=batch_items,
        seed="s",
    )
    score = {(r["item_id"], r["k"]): float(expected_answer(r["answer_logprobs"], policy.answers)) for r in rows}
    return [score[item.item_id, k] for item in items for k in range(rollouts)]


def cases(
    folder: Path, scales: list[str]
) -> Iterator[tuple[str, Track, Path, Configuration, int, list[Item], Decoded]]:
    """Yield names, manifest, configuration, items per batch, items and images of each policy and track."""
    for scale in scales:
        prompts, batch_items, pixels = SCALES[scale]
        weights = ROOT / BUNDLED
        if scale == "larger":
            write_larger_policy(weights := folder / "larger")
        manifest = folder / f"{scale}.json"
        write_json(manifest, {"path": str(weights), "files": model_files(weights)})
        by_track, images = questions(prompts)
        for track in TRACKS:
            c = Configuration(policy=PolicySettings(max_pixels=pixels))
            yield scale, track, manifest, c, batch_items, by_track[track], images


def main() -> None:
    """Measure and write results/rollouts.csv, with vLLM results/rollouts_vllm.csv."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contestants", nargs="+", choices=["plain", "transformers", "vllm"])
    parser.add_argument("--policies", nargs="+", choices=list(SCALES), default=list(SCALES))
    parser.add_argument("--tracks", nargs="+", choices=TRACKS, default=list(TRACKS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.set_defaults(contestants=["plain", "transformers"])
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for scale, track, manifest, c, batch_items, items, images in cases(Path(temporary), arguments.policies):
            if track not in arguments.tracks:
                continue
            config = ModelConfig.of(c, track)
            unchanged = as_policy(load_model(manifest, config), load_processor(manifest, config), config)
            works: dict[str, Callable[..., Any]] = {
                "plain": partial(plain, unchanged),
                "transformers": partial(engine, transformers_engine.generate, load_policy(manifest, None, config)),
            }
            if "vllm" in arguments.contestants:
                from workflow_scripts.rollouts import vllm_engine

                vllm = vllm_engine.load_into_vllm(manifest, None, config, RolloutsVllm())
                works["vllm"] = partial(engine, vllm_engine.generate, vllm)
            asked = (items, images)
            if scale == "bundled":  # its thoughts end, so that no answer is forced
                greedy = [works[name](*asked, 1, batch_items, Sampling(temperature=0)) for name in list(works)[:2]]
                # Not all agree: the order of sums decides between nearly equally likely tokens.
                assert np.isclose(*greedy, atol=1e-3).mean() > 0.9, greedy
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                for k in ROLLOUTS:
                    contestants = {
                        name: partial(works[name], *asked, k, batch_items, Sampling()) for name in arguments.contestants
                    }
                    for row in contest(contestants, arguments.rounds):
                        case = {"policy": scale, "track": track, "threads": threads, "items": len(items), "k": k}
                        print(json.dumps(case | row), flush=True)
                        found.append(case | row)
            del unchanged, works
            gc.collect()
    name = "rollouts_vllm" if "vllm" in arguments.contestants else "rollouts"
    replace_rows(name, ["policy", "track", "threads"], found)


if __name__ == "__main__":
    main()
