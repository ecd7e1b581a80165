"""Rollouts with soft scores: the transformers engine against what a user writes with `generate`, and against vLLM.

python -m benchmarks.rollouts                                    # plain transformers and the transformers engine
.venv-vllm/bin/python -m benchmarks.rollouts --engines vllm      # all three, in vLLM's environment

Two policies: the bundled one, and Qwen2.5-VL with Qwen's vocabulary and 40 M random parameters outside its embedding,
whose thoughts never close, so that all contestants generate the same number of tokens.
"""

import random
from typing import Any

import torch
from PIL import Image

from workflow_scripts.configuration import Sampling
from workflow_scripts.policy.loading import Policy
from workflow_scripts.policy.prompts import CLOSE_THINKING, OPEN_ANSWER, messages
from workflow_scripts.preferences.synthetic_scenes import draw, sample_prompt, sample_scene
from workflow_scripts.rollouts.items import Item, anchor_items, pointwise_items

SAMPLING = Sampling()
TRACKS = ("imagereward", "hpsv2")
SIZES = ((84, 84), (112, 70), (70, 126), (168, 168), (60, 60))  # width and height, mixed
ROLLOUTS = (1, 3, 8)


def questions(prompts: int) -> tuple[dict[str, list[Item]], dict[str, Image.Image]]:
    """Items of each track about four synthetic images of each prompt, and the images, of mixed sizes."""
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


@torch.no_grad()
def plain(
    policy: Policy, items: list[Item], images: dict[str, Image.Image], rollouts: int, batch_items: int
) -> list[float]:
    """What a user writes: `generate(num_return_sequences=k)`, then a second forward pass for the answer's logits."""
    model: Any = policy.model
    processor: Any = policy.processor
    answer_ids = torch.tensor(policy.answer_token_ids)
    opening = policy.tokenizer.encode(OPEN_ANSWER, add_special_tokens=False)
    budget = SAMPLING.max_thinking_tokens + SAMPLING.max_answer_tokens
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
            do_sample=True,
            temperature=SAMPLING.temperature,
            top_p=SAMPLING.top_p,
            top_k=SAMPLING.top_k,
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
        # The pictures once for each of its rollouts, in the order of the rows.
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
