"""Decoding from prompts with images: each prompt is prefilled once for all its rollouts, and finished rows are dropped.

Works with any transformers model that has a key-value cache. The caller decides what is decoded and when it ends.
"""

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from workflow_scripts.configuration.model import Sampling
from workflow_scripts.policy.fast.key_values import compaction_order, roomy_cache
from workflow_scripts.policy.fast.prompt_attention import PROMPT_ONCE, PromptStates
from workflow_scripts.rollouts.rollout import Completion

BLOCK = 128  # tokens
LARGE_VOCABULARY = 32 * BLOCK


class Decoding:
    """Rows in decoding, grouped by prompt with `rollouts` each, and the logits for the next token of each row."""

    logits: torch.Tensor
    """(rows, vocabulary), float32."""

    @torch.no_grad()
    def __init__(self, model: Any, inputs: Any, rollouts: int) -> None:
        """Prefill a processor's `inputs`, padded on the left, and start `rollouts` rows from each prompt."""
        self._model = model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        # The model's own positions, as in its `generate`: (rows, tokens), or (axes, rows, tokens) for a 3D rotation.
        prefilled = inner._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
        cache = roomy_cache(inner.config)
        out = model(**inputs, position_ids=prefilled, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._cache, self._mask, self._prompts = out.past_key_values, inputs["attention_mask"], None
        if inner.get_decoder().config._attn_implementation == PROMPT_ONCE:
            self._prompts = PromptStates(self._cache, self._mask, rollouts)
            self._cache = roomy_cache(inner.config)
        else:
            self._cache.batch_repeat_interleave(rollouts)
            self._mask = self._mask.repeat_interleave(rollouts, 0)
        self._positions = (prefilled[..., -1:] + 1).repeat_interleave(rollouts, -2)
        self.logits = out.logits[:, -1].float().repeat_interleave(rollouts, 0)

    @torch.no_grad()
    def step(self, keep: Sequence[int], tokens: Sequence[int]) -> None:
        """Keep only these rows, in this order, append a token to each, and compute their next logits."""
        if len(keep) < len(self.logits):
            index = torch.tensor(keep, device=self.logits.device)
            self._cache.batch_select_indices(index)
            self._positions = self._positions[..., index, :]
            if self._prompts:
                self._prompts.keep(keep)
            else:
                self._mask = self._mask[index]
        if self._prompts:
            attended = {"attention_mask": self._prompts.mask, "prompts": self._prompts}
        else:
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], 1)
            attended = {"attention_mask": self._mask}
        out = self._model(
            input_ids=torch.tensor([[token] for token in tokens], device=self.logits.device),
            **attended,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self.logits, self._positions = out.logits[:, -1].float(), self._positions + 1


class AnswerReader:
    """Reads the distribution over the answers before the first token of an answer that is not white space."""

    piece_of: Callable[[int], str]
    """The text of a token."""

    def __init__(self, tokenizer: Any, answer_ids: Sequence[int], device: torch.device) -> None:
        """`answer_ids` are the tokens of the answers, `device` is that of the logits."""
        self.piece_of = cache(lambda token: tokenizer.decode([token]))
        self._answer_ids = torch.tensor(answer_ids, device=device)

    def read(self, completions: Sequence[Completion], logits: torch.Tensor) -> None:
        """Record position and log-probabilities of the answers in each completion whose next token may be its answer.

        Args:
            completions: what was decoded so far.
            logits: (completions, vocabulary), for their next tokens, before temperature and other sampling settings.
        """
        if answering := [j for j, completion in enumerate(completions) if completion.answering]:
            logprobs = logits[answering][:, self._answer_ids].double().log_softmax(-1).tolist()
            for j, values in zip(answering, logprobs, strict=True):
                completions[j].answer_logprobs, completions[j].answer_position = values, len(completions[j].ids)


def warpers_of(sampling: Sampling) -> LogitsProcessorList:
    """Logits processors that apply temperature, top-k and top-p before a token is drawn."""
    warpers = LogitsProcessorList()
    if sampling.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def draw(
    logits: torch.Tensor, warpers: LogitsProcessorList, temperature: float, generator: torch.Generator | None
) -> list[int]:
    """Draw the next token of each row of (rows, vocabulary); at temperature 0, take the most likely one.

    Inverse-CDF sampling needs one random number per row. `torch.multinomial` draws one per vocabulary entry, which
    takes as long as the output head. The cumulative sum over a large vocabulary takes nearly as long, so there the
    lookup is first by block and then within the block.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    no_tokens: Any = torch.empty(len(logits), 0)  # no warper reads the tokens so far
    probabilities = warpers(no_tokens, logits).softmax(-1)
    random = torch.rand(len(logits), 1, dtype=torch.double, device=logits.device, generator=generator)
    if logits.shape[-1] < LARGE_VOCABULARY:
        return look_up(probabilities, random)[0][:, 0].tolist()
    blocks = torch.nn.functional.pad(probabilities, (0, -logits.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    block, rest = look_up(blocks.sum(-1), random)
    token, _ = look_up(blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0], rest)
    return (block * BLOCK + token)[:, 0].tolist()


def look_up(weights: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF lookup in each row: the index of the weight at a share of the total, and the position within it.

    The sums are in double precision, so that the smallest of many weights count. A weight of 0 is never found.

    Args:
        weights: (rows, n), not negative, with a positive sum.
        share: (rows, 1), float64, share of the total, from 0 to 1.

    Returns:
        Indices, (rows, 1), and positions from 0 to 1, (rows, 1), float64.
    """
    cumulated = weights.cumsum(-1, dtype=torch.double)
    last = torch.nextafter(cumulated[:, -1:], torch.zeros_like(share))  # a share of 1 finds the last positive weight
    reached = torch.minimum(share * cumulated[:, -1:], last)
    index = torch.searchsorted(cumulated, reached, right=True)
    beyond = (cumulated.gather(1, index) - reached) / weights.gather(1, index)
    return index, (1 - beyond).clamp(0, 1)


def sample_completions(
    model: Any,
    inputs: Any,
    rollouts: int,
    sampling: Sampling,
    max_tokens: int,
    end_ids: Collection[int],
    never: Sequence[int] = (),
    reader: AnswerReader | None = None,
) -> tuple[list[Completion], list[list[float]]]:
    """Sample `rollouts` completions of each prompt, up to and including an end token, of at most `max_tokens` tokens.

    Tokens in `never` are not sampled. Random numbers come from torch's default generator.

    Returns:
        The completions, and the log-probability of each of their tokens in softmax(logits / temperature) over the
        whole vocabulary, as TRL scores it: without top-k and top-p, and with the tokens in `never`. `reader` fills in
        the answers' log-probabilities; without it, no token is decoded to text.
    """
    decoding = Decoding(model, inputs, rollouts)
    warpers = warpers_of(sampling)
    ruled_out = torch.tensor(never, dtype=torch.long, device=decoding.logits.device)
    completions = [Completion() for _ in range(len(decoding.logits))]
    logprobs: list[list[float]] = [[] for _ in completions]
    alive = list(range(len(completions)))
    for length in range(1, max_tokens + 1):
        if reader:
            reader.read([completions[row] for row in alive], decoding.logits)
        scaled = decoding.logits / (sampling.temperature or 1)
        tokens = draw(decoding.logits.index_fill_(1, ruled_out, -torch.inf), warpers, sampling.temperature, None)
        losses = torch.nn.functional.cross_entropy(scaled, torch.tensor(tokens, device=scaled.device), reduction="none")
        for row, token, loss in zip(alive, tokens, losses.tolist(), strict=True):
            completions[row].append(token, reader.piece_of(token) if reader else "")
            logprobs[row].append(-loss)
        keep = [j for j, token in enumerate(tokens) if token not in end_ids]
        if not keep or length == max_tokens:
            break
        keep = compaction_order(keep)
        alive = [alive[j] for j in keep]
        decoding.step(keep, [tokens[j] for j in keep])
    return completions, logprobs
