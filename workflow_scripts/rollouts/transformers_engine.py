"""The transformers engine: it encodes images and prefills prompts once for all rollouts, and reads the answer logits.

A batch depends only on the given items, and the random numbers only on the seed. The result of a shard is therefore the
same whichever other shards ran, and on any number of cores.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from tqdm import tqdm

from workflow_scripts.configuration.model import Sampling
from workflow_scripts.policy.fast.key_values import compaction_order
from workflow_scripts.policy.loading import Policy
from workflow_scripts.policy.prompts import messages
from workflow_scripts.preferences.images import Images
from workflow_scripts.rollouts.decoding import AnswerReader, Decoding, draw, warpers_of
from workflow_scripts.rollouts.items import Item, stable_random
from workflow_scripts.rollouts.rollout import Rollout


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

    Items are batched by length. A batch reads its own images, so any number of images fits into memory.

    Args:
        policy: model, processor and question.
        items: questions to ask.
        images: the images that the items name.
        rollouts: number of rollouts of each item.
        first_k: index of the first of them.
        sampling: temperature, token budgets and the other sampling settings.
        batch_items: items that are prefilled together.
        seed: any text; each batch derives its own random generator from it.
    """
    if not items:  # a shard beyond the end of the test set, or one without a readable image
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
        shown = cache(images.read)  # one object for all questions that show an image, so that it is processed once
        inputs = policy.processor(
            text=[prompts[i] for i in batch],
            images=[[shown(name) for name in items[i].image_ids] for i in batch],
            padding=True,
            add_special_tokens=False,  # the chat template has them
            return_tensors="pt",
        )
        sampled = [_Decoded(items[i], k, batch_seed) for i in batch for k in range(first_k, first_k + rollouts)]
        _sample(policy, inputs.to(policy.model.device), sampled, rollouts, sampling)
        yield from (rollout.row(tokenizer, policy.answers) for rollout in sampled)


@dataclass
class _Decoded(Rollout):
    """A rollout that is decoded token by token."""

    queued: list[int] = field(default_factory=list)  # tokens that the engine puts in instead of drawn ones

    def add(self, drawn: int, ended: bool, sampling: Sampling, tokenizer: Any, piece_of: Callable[[int], str]) -> bool:
        """Add the drawn token, which may end the completion, or a queued one; return whether decoding goes on."""
        used_up = ended or len(self.ids) >= sampling.max_thinking_tokens
        if self.answer_start is None and not self.queued and used_up:
            self.queued = self.forced_tokens(tokenizer)
        if self.queued:
            drawn = self.queued.pop(0)
        elif ended:
            return False
        self.append(drawn, piece_of(drawn))
        return self.answer_start is None or len(self.ids) - self.answer_start < sampling.max_answer_tokens


def _sample(policy: Policy, inputs: Any, batch: list[_Decoded], rollouts: int, sampling: Sampling) -> None:
    """Complete a batch that has `rollouts` rollouts of each prompt side by side."""
    tokenizer, device = policy.tokenizer, policy.model.device
    ends: Any = policy.model.generation_config.eos_token_id
    end_ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    generator = torch.Generator(device).manual_seed(batch[0].seed % 2**63)
    warpers = warpers_of(sampling)
    reader = AnswerReader(tokenizer, policy.answer_token_ids, device)
    decoding = Decoding(policy.model, inputs, rollouts)
    alive = batch
    while alive:
        reader.read(alive, decoding.logits)
        drawn = draw(decoding.logits, warpers, sampling.temperature, generator)
        goes_on = [
            rollout.add(token, token in end_ids, sampling, tokenizer, reader.piece_of)
            for rollout, token in zip(alive, drawn, strict=True)
        ]
        keep = compaction_order([j for j, going_on in enumerate(goes_on) if going_on])
        alive = [alive[j] for j in keep]
        if alive:
            decoding.step(keep, [rollout.ids[-1] for rollout in alive])
