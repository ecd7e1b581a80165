"""The vLLM engine: the same records as the transformers engine, from an engine that batches and caches by itself.

A rollout is two requests. The first thinks until it opens its answer; the second starts behind that, or behind the
closing that the engine puts in, and reports the log-probabilities of the answer tokens at every step. Both find the
question in vLLM's prefix cache. Random numbers depend on the seed, the item and k alone; vLLM runs in this process, so
that what it puts into a batch does not depend on when requests reach it.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from workflow_scripts.configuration.model import RolloutsVllm, Sampling
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.policy.loading import Policy, as_policy, image_settings, load_processor
from workflow_scripts.policy.manifest import PolicyError, base_path
from workflow_scripts.policy.prompts import CLOSE_THINKING, OPEN_ANSWER, messages, sampled_answer
from workflow_scripts.preferences.images import Images
from workflow_scripts.rollouts.items import Item, stable_random

# Ranks that vLLM has room for (vllm.config.lora.MaxLoRARanks).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass
class VllmModel:
    """What stands in `Policy.model` for a model that vLLM holds."""

    llm: Any
    config: PreTrainedConfig  # with the context that vLLM has room for
    end_ids: set[int]
    adapter: Any  # a LoRARequest, or None


def load_into_vllm(manifest: Path, adapter: Path | None, config: ModelConfig, settings: RolloutsVllm) -> Policy:
    """The base policy in vLLM, or the one with this LoRA adapter (a folder).

    Raises:
        PolicyError: the folder differs from the manifest, or vLLM is not installed or does not take the policy.
    """
    folder = base_path(manifest)
    # Read by vLLM when it is imported. OMP_NUM_THREADS is the workflow's; a binding would put all jobs on one core.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",  # on CPU it warns twice for each request
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_cache_gigabytes),
    }
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise PolicyError(
            f"vLLM cannot be imported here ({error}); set vllm_python to the interpreter of an environment with it "
            "(docs/vllm.md), or rollouts.engine to transformers"
        ) from error
    torch.set_num_threads(config.numeric_threads)
    rank = json.loads((adapter / "adapter_config.json").read_text())["r"] if adapter else RANKS[0]
    if rank > RANKS[-1]:
        raise PolicyError(
            f"{adapter} has rank {rank}, vLLM takes at most {RANKS[-1]}; set rollouts.engine to transformers"
        )
    processor = load_processor(manifest, config)
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text_config = model_config.get_text_config()
    text_config.max_position_embeddings = min(settings.max_model_len, text_config.max_position_embeddings)
    on_gpu = {
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": settings.enforce_eager,
    }
    llm = LLM(
        model=str(folder),
        dtype=config.dtype,
        seed=0,
        max_model_len=text_config.max_position_embeddings,
        generation_config="vllm",  # vLLM's own defaults, not the model's: every setting is given with each request
        enable_prefix_caching=True,
        # A question prefilled in two parts would draw one random number more (on CPU vLLM fails there).
        enable_chunked_prefill=False,
        logprobs_mode="raw_logprobs",  # before temperature and other sampling settings
        limit_mm_per_prompt={"image": config.template.count("{image}"), "video": 0},
        mm_processor_kwargs=image_settings(config),
        enable_lora=adapter is not None,
        max_lora_rank=min(room for room in RANKS if room >= rank),
        trust_remote_code=False,
        disable_log_stats=True,
        **(on_gpu if config.device == "cuda" else {"enforce_eager": True, "block_size": 32}),
    )
    ends = _end_ids(folder, model_config) | {processor.tokenizer.eos_token_id}
    request = LoRARequest("adapter", 1, str(adapter.resolve())) if adapter else None
    model: Any = VllmModel(llm, model_config, ends, request)
    return as_policy(model, processor, config)


def _end_ids(folder: Path, config: PreTrainedConfig) -> set[int]:
    """Tokens that end a completion: all that is used of the model's own generation_config."""
    if (folder / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    else:
        ends = GenerationConfig.from_model_config(config).eos_token_id
    return {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None}


@dataclass
class _Rollout:
    """A completion in the making."""

    item: Item
    question: dict[str, Any]
    k: int
    seed: int
    ids: list[int]
    text: str = ""
    forced: bool = False
    ended: bool = False


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

    The arguments are the transformers engine's, but that vLLM makes its own batches of the `batch_items` items that it
    is given at once, which need no sizes, and that each rollout draws from generators of its own made from the seed.
    """
    if not items:  # a shard beyond the end of the test set, or one whose images cannot be read
        return
    chats = [messages(policy.template, item.prompt) for item in items]
    prompts = policy.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    token_ids = policy.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    order = sorted(range(len(items)), key=lambda i: items[i].item_id)
    for start in tqdm(range(0, len(order), batch_items), desc="batches of items", mininterval=10):
        shown = cache(images.read)
        batch = []
        for i in order[start : start + batch_items]:
            question = {
                "prompt_token_ids": token_ids[i],  # one token for each image, which vLLM expands
                "multi_modal_data": {"image": [shown(name) for name in items[i].image_ids]},
            }
            for k in range(first_k, first_k + rollouts):
                batch.append(_Rollout(items[i], question, k, _seed(seed, items[i].item_id, k), []))
        _think(policy, batch, sampling)
        yield from _answer(policy, batch, sampling)


def _seed(*parts: object) -> int:
    return stable_random(*parts) % 2**63  # vLLM's are signed


def _think(policy: Policy, batch: list[_Rollout], sampling: Sampling) -> None:
    """Let every rollout think until it opens its answer; open it for those that end, or use up their budget, before.

    vLLM stops where `<answer>` first occurs in the text. Where that is inside a longer token the answer is not opened,
    as in the transformers engine, and the rollout goes on.
    """
    tokenizer = policy.tokenizer
    closing = tokenizer.encode(CLOSE_THINKING + OPEN_ANSWER, add_special_tokens=False)
    opening = tokenizer.encode(OPEN_ANSWER, add_special_tokens=False)
    model: Any = policy.model
    thinking = batch
    while thinking:
        outputs = _complete(
            policy,
            thinking,
            sampling,
            [{"max_tokens": sampling.max_thinking_tokens - len(rollout.ids)} for rollout in thinking],
            stop=[OPEN_ANSWER],
        )
        for rollout, output in zip(thinking, outputs, strict=True):
            new = list(output.token_ids)
            rollout.ended = bool(new) and new[-1] in model.end_ids
            rollout.ids += new[:-1] if rollout.ended else new
            rollout.text = "".join(tokenizer.decode([token]) for token in rollout.ids)
        thinking = [
            rollout
            for rollout in thinking
            if not rollout.ended and not _opened(rollout) and len(rollout.ids) < sampling.max_thinking_tokens
        ]
    for rollout in batch:
        if not _opened(rollout):
            rollout.forced = True
            rollout.ids += opening if CLOSE_THINKING in rollout.text else closing


def _opened(rollout: _Rollout) -> bool:
    return not rollout.ended and rollout.text.rstrip().endswith(OPEN_ANSWER)


def _answer(policy: Policy, batch: list[_Rollout], sampling: Sampling) -> Iterator[dict[str, Any]]:
    """Sample the answers and record the log-probabilities before the first token that is not white space."""
    tokenizer = policy.tokenizer
    answer_ids = policy.answer_token_ids
    model: Any = policy.model
    budgets = [{"max_tokens": sampling.max_answer_tokens} for _ in batch]
    outputs = _complete(policy, batch, sampling, budgets, logprob_token_ids=answer_ids)
    for rollout, output in zip(batch, outputs, strict=True):
        new = [token for token in output.token_ids if token not in model.end_ids]
        blank = [not tokenizer.decode([token]).strip() for token in output.token_ids]
        at = blank.index(False) if False in blank else len(blank) - 1
        reported = torch.tensor([output.logprobs[at][token].logprob for token in answer_ids], dtype=torch.float64)
        text = tokenizer.decode(rollout.ids + new, skip_special_tokens=False)
        yield rollout.item.columns() | {
            "k": rollout.k,
            "seed": rollout.seed,
            "completion_ids": rollout.ids + new,
            "text": text,
            "answer_position": len(rollout.ids) + at,
            "forced": rollout.forced,
            "sampled_answer": sampled_answer(text, policy.answers),
            "answer_logprobs": reported.log_softmax(-1).tolist(),
        }


def _complete(
    policy: Policy, batch: list[_Rollout], sampling: Sampling, options: list[dict[str, Any]], **common: Any
) -> list[Any]:
    """Completion of each question with what its rollout has so far."""
    from vllm import SamplingParams

    model: Any = policy.model
    requests = [
        rollout.question | {"prompt_token_ids": rollout.question["prompt_token_ids"] + rollout.ids} for rollout in batch
    ]
    params = [
        SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=_seed(rollout.seed, len(rollout.ids)),
            stop_token_ids=sorted(model.end_ids),
            skip_special_tokens=False,
            **option,
            **common,
        )
        for rollout, option in zip(batch, options, strict=True)
    ]
    outputs = model.llm.generate(requests, params, lora_request=model.adapter, use_tqdm=False)
    return [output.outputs[0] for output in outputs]
