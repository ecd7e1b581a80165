"""TRL's and PEFT's settings for a training's configuration; docs/method.md relates them to the paper's symbols."""

from pathlib import Path
from typing import Any

from peft import LoraConfig
from trl import GRPOConfig

from workflow_scripts.configuration.model import Lora, Training
from workflow_scripts.configuration.stages import TrainGrpo

BEST = "eval_soft_pair_accuracy"  # the metric by which the best checkpoint is chosen
DIFFERENCE = "sampling/sampling_logp_difference"  # TRL's name for |log-probability sampled - scored|


class ProcessesError(RuntimeError):
    """The processes of a training are not those that its configuration asks for: names both and the remedy."""


def processes_of(config: TrainGrpo) -> int:
    """Number of processes that train together."""
    return config.distributed.processes if config.distributed else 1


def strategy_of(config: TrainGrpo) -> str | None:
    """How several processes train together; None for a single process."""
    return config.distributed.strategy if config.distributed else None


def distributed_settings(config: TrainGrpo) -> dict[str, Any]:
    """TRL's settings for several processes.

    LoRA freezes the base weights, so ZeRO stage 2 shards everything that training adds. Every adapter weight has a
    gradient in every step, so DDP need not search for unused ones.
    """
    strategy = strategy_of(config)
    if strategy == "ddp":
        return {"ddp_find_unused_parameters": False}
    if strategy == "fsdp":
        return {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    if strategy == "deepspeed":
        keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        zero = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
        return {"deepspeed": zero | dict.fromkeys(keys, "auto")}
    return {}


def grpo_config(config: TrainGrpo, folder: Path, resumed: bool) -> GRPOConfig:
    """TRL's settings for a training, with checkpoints in `folder`; making them also assigns this process its GPU."""
    t: Training = config.training
    completions = t.prompts_per_step * t.group_size
    return GRPOConfig(
        **distributed_settings(config),
        output_dir=str(folder),
        max_steps=t.steps or -1,  # the stage counts those of `epochs` when it knows the items
        per_device_train_batch_size=completions // t.gradient_accumulation // processes_of(config),
        per_device_eval_batch_size=t.group_size,
        gradient_accumulation_steps=t.gradient_accumulation,
        num_generations=t.group_size,
        max_completion_length=t.max_completion_tokens,
        temperature=t.temperature,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.learning_rate_schedule,
        warmup_steps=t.warmup_steps,
        max_grad_norm=t.max_grad_norm,
        weight_decay=t.weight_decay,
        adam_beta1=t.adam_beta1,
        adam_beta2=t.adam_beta2,
        beta=t.beta,
        epsilon=t.epsilon,
        loss_type=t.loss_type,
        scale_rewards=t.scale_rewards,
        importance_sampling_level=t.importance_sampling_level,
        num_iterations=t.num_iterations,
        gradient_checkpointing=t.gradient_checkpointing,
        reward_weights=[weight for _, weight in t.rewards],  # type: ignore[attr-defined]
        bf16=config.model.dtype == "bfloat16",
        fp16=config.model.dtype == "float16",
        use_cpu=config.model.device == "cpu",
        dataloader_pin_memory=config.model.device != "cpu",
        seed=config.seed,
        data_seed=config.seed,
        eval_strategy="steps",
        eval_on_start=not resumed,
        eval_steps=t.validate_every,
        save_strategy="steps",
        save_steps=t.validate_every,
        save_total_limit=2,
        metric_for_best_model=BEST,
        greater_is_better=True,
        logging_steps=1,
        report_to="none",
        disable_tqdm=False,
        **generation_settings(t),
    )


def generation_settings(t: Training) -> dict[str, Any]:
    """TRL's settings for generation by vLLM; none for the other generators."""
    if not t.generation.startswith("vllm"):
        return {}
    if t.generation == "vllm_server":
        return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": t.vllm.server_url}
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": t.vllm.gpu_memory_utilization,
        "vllm_max_model_length": t.vllm.max_model_len,
    }


def lora_config(lora: Lora) -> LoraConfig:
    """PEFT's settings for the adapter."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )


def check_processes(config: TrainGrpo, settings: GRPOConfig) -> None:
    """Check that as many processes train as the configuration asks for.

    Raises:
        ProcessesError: the numbers differ.
    """
    processes = processes_of(config)
    if settings.world_size != processes:
        raise ProcessesError(
            f"the configuration asks for {processes} processes, but this is one of {settings.world_size}; start "
            f"it by torchrun --standalone --nproc-per-node {processes} -m workflow_scripts.stages.train_grpo"
        )
