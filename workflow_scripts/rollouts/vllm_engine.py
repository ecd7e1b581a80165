"""The vLLM engine: the same rows as the transformers engine, with vLLM's own batching and caching.

A rollout takes two requests. The first thinks until the answer opens. The second continues from there, or from the tags
that the engine puts in, and reports the log-probabilities of the answer tokens at every step. Both find the question in
vLLM's prefix cache. Random numbers depend only on the seed, the item and k. vLLM runs in this process, so its batches
do not depend on when requests arrive.
"""

import json
import logging
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
from workflow_scripts.policy.manifest import ADAPTER_CONFIG, PolicyError, base_path
from workflow_scripts.policy.prompts import OPEN_ANSWER, messages
from workflow_scripts.policy.published_adapter import published_adapter
from workflow_scripts.preferences.images import Images
from workflow_scripts.rollouts.items import Item, stable_random
from workflow_scripts.rollouts.rollout import Rollout

# LoRA ranks that vLLM supports (vllm.config.lora.MaxLoRARanks).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
Questions = dict[Item, dict[str, Any]]  # vLLM's request for the question of each item


@dataclass
class VllmModel:
    """`Policy.model` for a model that vLLM holds."""

    llm: Any
    config: PreTrainedConfig  # with the context length that vLLM was given
    end_ids: set[int]
    adapter: Any  # LoRARequest, or None


def load_into_vllm(manifest: Path, adapter: Path | None, config: ModelConfig, settings: RolloutsVllm) -> Policy:
    """Load the base policy into vLLM with a LoRA adapter, if there is one.

    The adapter is the one in the given folder, else the published one that the manifest names.

    Raises:
        PolicyError: the folder differs from the manifest, vLLM is not installed, or it does not support the policy.
    """
    processor = load_processor(manifest, config)
    return folder_into_vllm(base_path(manifest), processor, adapter or published_adapter(manifest), config, settings)


def folder_into_vllm(
    folder: Path,
    processor: Any,
    adapter: Path | None,
    config: ModelConfig,
    settings: RolloutsVllm,
    load_format: str = "auto",
) -> Policy:
    """Load the base policy in a folder into vLLM, as `load_into_vllm` does.

    Args:
        folder: of the base policy.
        processor: of it.
        adapter: folder of the LoRA adapter, if there is one.
        config: of the policy.
        settings: of vLLM.
        load_format: of the weights; with vLLM's `dummy` the folder needs none, and they are random.

    Raises:
        PolicyError: vLLM is not installed, or it does not support the policy.
    """
    # vLLM reads these on import. The workflow sets OMP_NUM_THREADS; binding would put all jobs on one core.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
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
    logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)  # it warns twice per request
    torch.set_num_threads(config.numeric_threads)
    rank = json.loads((adapter / ADAPTER_CONFIG).read_text())["r"] if adapter else RANKS[0]
    if rank > RANKS[-1]:
        raise PolicyError(
            f"{adapter} has rank {rank}, vLLM supports at most {RANKS[-1]}; set rollouts.engine to transformers"
        )
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text_config = model_config.get_text_config()
    text_config.max_position_embeddings = min(settings.max_model_len, text_config.max_position_embeddings)
    on_gpu = {
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": settings.enforce_eager,
    }
    # Chunks of a question share the seed of its rollout. vLLM's sampler on a CPU cannot, and fails.
    on_cpu = {"enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False}
    llm = LLM(
        model=str(folder),
        load_format=load_format,
        dtype=config.dtype,
        seed=0,
        max_model_len=text_config.max_position_embeddings,
        generation_config="vllm",  # not the model's defaults; every request gives every setting
        enable_prefix_caching=True,
        logprobs_mode="raw_logprobs",  # before temperature and other sampling settings
        hf_overrides={"head_dtype": "float32"},  # logits as in the transformers engine
        limit_mm_per_prompt={"image": config.template.count("{image}"), "video": 0},
        mm_processor_kwargs=image_settings(config),
        enable_lora=adapter is not None,
        max_lora_rank=min(room for room in RANKS if room >= rank),
        trust_remote_code=False,
        disable_log_stats=True,
        **(on_gpu if config.device == "cuda" else on_cpu),
    )
    ends = _end_ids(folder, model_config) | {processor.tokenizer.eos_token_id}
    request = LoRARequest("adapter", 1, str(adapter.resolve())) if adapter else None
    model: Any = VllmModel(llm, model_config, ends, request)
    return as_policy(model, processor, config)


def _end_ids(folder: Path, config: PreTrainedConfig) -> set[int]:
    """End tokens of the model's generation_config, of which nothing else is used."""
    if (folder / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    else:
        ends = GenerationConfig.from_model_config(config).eos_token_id
    return {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None}


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

    The arguments are those of the transformers engine. vLLM makes its own batches of the `batch_items` items that it is
    given together, and needs no image sizes. Each rollout has its own random generators, derived from `seed`.
    """
    if not items:  # a shard beyond the end of the test set, or one without a readable image
        return
    chats = [messages(policy.template, item.prompt) for item in items]
    prompts = policy.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    token_ids = policy.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    order = sorted(range(len(items)), key=lambda i: items[i].item_id)
    for start in tqdm(range(0, len(order), batch_items), desc="batches of items", mininterval=10):
        shown = cache(images.read)
        chosen = order[start : start + batch_items]
        questions = {
            items[i]: {
                "prompt_token_ids": token_ids[i],  # one token for each image, which vLLM expands
                "multi_modal_data": {"image": [shown(name) for name in items[i].image_ids]},
            }
            for i in chosen
        }
        batch = [
            Rollout(items[i], k, _seed(seed, items[i].item_id, k))
            for i in chosen
            for k in range(first_k, first_k + rollouts)
        ]
        _think(policy, questions, batch, sampling)
        _answer(policy, questions, batch, sampling)
        yield from (rollout.row(policy.tokenizer, policy.answers) for rollout in batch)


def _seed(*parts: object) -> int:
    return stable_random(*parts) % 2**63  # vLLM takes signed seeds


def _think(policy: Policy, questions: Questions, batch: list[Rollout], sampling: Sampling) -> None:
    """Let each rollout think until it opens its answer; open the answer of those that end or use up their budget.

    vLLM stops where `<answer>` first occurs in the text. If that is inside a longer token, the answer is not open and
    the rollout goes on, as in the transformers engine.
    """
    tokenizer = policy.tokenizer
    model: Any = policy.model
    thinking = batch
    while thinking:
        budgets = [{"max_tokens": sampling.max_thinking_tokens - len(rollout.ids)} for rollout in thinking]
        outputs = _complete(policy, questions, thinking, sampling, budgets, stop=[OPEN_ANSWER])
        going_on = []
        for rollout, output in zip(thinking, outputs, strict=True):
            new = list(output.token_ids)
            ended = bool(new) and new[-1] in model.end_ids
            rollout.ids += new[:-1] if ended else new
            rollout.text = "".join(tokenizer.decode([token]) for token in rollout.ids)
            if rollout.opens_answer and not ended:
                rollout.answer_start = len(rollout.ids)
            elif not ended and len(rollout.ids) < sampling.max_thinking_tokens:
                going_on.append(rollout)
        thinking = going_on
    for rollout in batch:
        if rollout.answer_start is None:
            rollout.ids += rollout.forced_tokens(tokenizer)
            rollout.answer_start = len(rollout.ids)


def _answer(policy: Policy, questions: Questions, batch: list[Rollout], sampling: Sampling) -> None:
    """Sample the answers, and record the log-probabilities before the first token that is not white space."""
    tokenizer = policy.tokenizer
    answer_ids = policy.answer_token_ids
    model: Any = policy.model
    budgets = [{"max_tokens": sampling.max_answer_tokens} for _ in batch]
    outputs = _complete(policy, questions, batch, sampling, budgets, logprob_token_ids=answer_ids)
    for rollout, output in zip(batch, outputs, strict=True):
        blank = [not tokenizer.decode([token]).strip() for token in output.token_ids]
        at = blank.index(False) if False in blank else len(blank) - 1
        reported = torch.tensor([output.logprobs[at][token].logprob for token in answer_ids], dtype=torch.float64)
        rollout.answer_logprobs = reported.log_softmax(-1).tolist()
        rollout.answer_position = len(rollout.ids) + at
        rollout.ids += [token for token in output.token_ids if token not in model.end_ids]


def _complete(
    policy: Policy,
    questions: Questions,
    batch: list[Rollout],
    sampling: Sampling,
    options: list[dict[str, Any]],
    **common: Any,
) -> list[Any]:
    """Let vLLM continue the question and the tokens so far of each rollout."""
    from vllm import SamplingParams

    model: Any = policy.model
    asked = [questions[rollout.item] for rollout in batch]
    requests = [
        question | {"prompt_token_ids": question["prompt_token_ids"] + rollout.ids}
        for question, rollout in zip(asked, batch, strict=True)
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
