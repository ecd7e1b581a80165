"""The transformers engine: image encoded and prompt prefilled once for all rollouts, answer logits read in the pass.

What is in a batch depends on the items given alone, and the random numbers on the seed alone: a shard's result is the
same whichever other shards ran, and on any number of cores.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from tqdm import tqdm

from workflow_scripts.configuration.model import Sampling
from workflow_scripts.policy.fast.key_values import compaction_order
from workflow_scripts.policy.loading import Policy
from workflow_scripts.policy.prompts import CLOSE_THINKING, OPEN_ANSWER, messages, sampled_answer
from workflow_scripts.preferences.images import Images
from workflow_scripts.rollouts.decoding import Decoding, draw, warpers_of
from workflow_scripts.rollouts.items import Item, stable_random


def generate(
    policy: Policy,
    items: list[Item],
    images: Images,
    *,
    rollouts: int,
    first_k: int,
    sampling: Sampling,
    batch_items: int,
    seed: str,
) -> Iterator[dict[str, Any]]:
    """Generate `rollouts` rollouts of every item, as rows of `rollouts.record.ROLLOUT`.

    Items are batched by length; an image is read for the batches that show it, so that any number fits into memory.

    Args:
        policy: what answers.
        items: questions.
        images: the images that the items name.
        rollouts: of each item.
        first_k: number of the first of them.
        sampling: temperature, budgets and what else decides about a token.
        batch_items: items that are prefilled together.
        seed: any text; each batch draws from a generator of its own made from it.
    """
    if not items:  # a shard beyond the end of the test set, or one whose images cannot be read
        return
    tokenizer = policy.tokenizer
    chats = [messages(policy.template, item.prompt) for item in items]
    prompts = policy.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    pixels = [sum(math.prod(images.sizes[name]) for name in item.image_ids) for item in items]
    order = sorted(range(len(items)), key=lambda i: (pixels[i], lengths[i], items[i].item_id))
    for start in tqdm(range(0, len(order), batch_items), desc="batches of items", mininterval=10):
        batch = order[start : start + batch_items]
        batch_seed = stable_random(seed, start)
        shown = cache(images.read)  # one object for all questions that show an image, which is processed once
        inputs = policy.processor(
            text=[prompts[i] for i in batch],
            images=[[shown(name) for name in items[i].image_ids] for i in batch],
            padding=True,
            add_special_tokens=False,  # the chat template has them
            return_tensors="pt",
        )
        completions = _sample(policy, inputs.to(policy.model.device), rollouts, sampling, batch_seed)
        for row, completion in enumerate(completions):
            item = items[batch[row // rollouts]]
            yield item.columns() | {"k": first_k + row % rollouts, "seed": batch_seed} | completion


def _sample(policy: Policy, inputs: Any, rollouts: int, sampling: Sampling, seed: int) -> list[dict[str, Any]]:
    """Sample `rollouts` completions of each prompt of a batch.

    A row thinks until it opens its answer; the logits before the first token there that is not white space are
    recorded. A row that ends, or uses up its thinking budget, before that is made to open its answer.
    """
    tokenizer = policy.tokenizer
    device = policy.model.device
    ends: Any = policy.model.generation_config.eos_token_id
    end_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    closing = tokenizer.encode(CLOSE_THINKING + OPEN_ANSWER, add_special_tokens=False)
    opening = tokenizer.encode(OPEN_ANSWER, add_special_tokens=False)
    answer_ids = torch.tensor(policy.answer_token_ids, device=device)
    generator = torch.Generator(device).manual_seed(seed % 2**63)
    warpers = warpers_of(sampling)
    pieces: dict[int, str] = {}

    decoding = Decoding(policy.model, inputs, rollouts)
    count = len(decoding.logits)
    alive = list(range(count))
    ids: list[list[int]] = [[] for _ in range(count)]
    text = [""] * count
    queued: list[list[int]] = [[] for _ in range(count)]  # tokens that the engine will put in
    opened: list[int | None] = [None] * count  # length at which the answer was opened
    position: list[int | None] = [None] * count  # of the recorded logits; the last one stands
    waiting = [False] * count  # the next token that is not white space is the answer
    forced = [False] * count
    logprobs: list[list[float]] = [[] for _ in range(count)]

    while True:
        asked = [j for j, row in enumerate(alive) if waiting[row]]
        if asked:
            restricted = decoding.logits[asked][:, answer_ids].double().log_softmax(-1).tolist()
            for j, values in zip(asked, restricted, strict=True):
                logprobs[alive[j]], position[alive[j]] = values, len(ids[alive[j]])
        drawn = draw(decoding.logits, warpers, sampling.temperature, generator)
        keep = []
        for j, row in enumerate(alive):
            token = drawn[j]
            ended = token in end_ids
            if not queued[row] and opened[row] is None and (ended or len(ids[row]) >= sampling.max_thinking_tokens):
                forced[row] = True
                queued[row] = list(opening if CLOSE_THINKING in text[row] else closing)
            if queued[row]:
                token = queued[row].pop(0)
            elif ended:
                continue
            ids[row].append(token)
            if token not in pieces:
                pieces[token] = tokenizer.decode([token])
            text[row] += pieces[token]
            if opened[row] is None:
                if text[row].rstrip().endswith(OPEN_ANSWER):
                    opened[row], waiting[row] = len(ids[row]), True
            elif waiting[row] and pieces[token].strip():
                waiting[row] = False
            drawn[j] = token
            budget_from = opened[row]
            if budget_from is None or len(ids[row]) - budget_from < sampling.max_answer_tokens:
                keep.append(j)
        if not keep:
            break
        keep = compaction_order(keep)
        alive = [alive[j] for j in keep]
        decoding.step(keep, [drawn[j] for j in keep])

    texts = tokenizer.batch_decode(ids, skip_special_tokens=False)
    return [
        {
            "completion_ids": ids[row],
            "text": texts[row],
            "answer_position": position[row],
            "forced": forced[row],
            "sampled_answer": sampled_answer(texts[row], policy.answers),
            "answer_logprobs": logprobs[row],
        }
        for row in range(count)
    ]
