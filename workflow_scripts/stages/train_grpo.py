"""Train a LoRA adapter with GRPO on one track (paper §2.2 and §4), and keep the adapter that validates best.

python -m workflow_scripts.stages.train_grpo --base results/policies/base/manifest.json \
    --train results/datasets/imagereward/train/subset.parquet \
    --train_images results/datasets/imagereward/train/images-0000.parquet \
    --validation results/datasets/imagereward/validation/subset.parquet \
    --validation_images results/datasets/imagereward/validation/images-0000.parquet \
    --adapter results/policies/imagereward/seed0/adapter_model.safetensors \
    --adapter_config results/policies/imagereward/seed0/adapter_config.json \
    --record results/policies/imagereward/seed0/training.json \
    --checkpoints results/checkpoints --config '{"track": "imagereward", "seed": 0, "model": {…}, "training": {…}}'

The run goes on from its last complete checkpoint in `<checkpoints>/<stage_key>` after a kill.

With `distributed` in the configuration it is started by torchrun, once in each process:
torchrun --standalone --nproc-per-node 2 -m workflow_scripts.stages.train_grpo …
"""

import contextlib
import importlib.util
import json
import math
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from PIL import Image
from transformers import TrainerCallback, TrainerState
from trl import GRPOConfig, GRPOTrainer

from workflow_scripts.configuration.model import Sampling, Training
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.files.writing import replacing, write_json
from workflow_scripts.policy.fast.enable import enable_faster_passes
from workflow_scripts.policy.loading import as_policy, check_adapted_layers, load_model, load_processor
from workflow_scripts.policy.manifest import PolicyError, base_path
from workflow_scripts.policy.prompts import ANSWERS, messages
from workflow_scripts.preferences.images import Images, decoded
from workflow_scripts.preferences.schema import IMAGES, SUBSET, SchemaError, check_schema, read_table
from workflow_scripts.rollouts.context import too_long
from workflow_scripts.rollouts.decoding import sample_completions
from workflow_scripts.rollouts.items import Item, stable_random
from workflow_scripts.rollouts.transformers_engine import generate
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.scoring.pair_accuracy import expected_answer, pair_accuracy
from workflow_scripts.tracking.stage_run import Run, run_stage
from workflow_scripts.training.rewards import approximate_reward, exact_reward, format_reward

REWARDS = {"format": format_reward, "exact": exact_reward, "approximate": approximate_reward}
BEST = "eval_soft_pair_accuracy"
STATE = "trainer_state.json"  # of a checkpoint, written last
# Class that the model in training is an instance of; PeftModel alone is what one process trains.
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp": "FSDPModule", "deepspeed": "DeepSpeedEngine"}


class ProcessesError(RuntimeError):
    """The processes of a training are not what its configuration asks for: names both and the remedy."""


class Arguments(StageArguments):
    """Train a LoRA adapter with GRPO on one track."""

    base: Input
    """Manifest of the base policy."""
    train: Input
    """Training prompts with their annotations."""
    train_images: Input
    """Their images."""
    validation: Input
    """Validation prompts with their annotations."""
    validation_images: Input
    """Their images."""
    adapter: Output
    """Weights of the adapter that validated best."""
    adapter_config: Output
    """Its configuration."""
    record: Output
    """What happened in training: curves, validations with their answer histograms, best step, collapse."""
    checkpoints: Path
    """Folder of resume states."""
    config: TrainGrpo
    """Configuration of this stage as JSON."""


def training_items(rows: list[dict[str, Any]], readable: set[str], protocol: str, seed: int) -> list[tuple[Item, int]]:
    """Items with targets: an image with its rating, or a pair in random order with 1 where the second is preferred."""
    items = []
    for row in rows:
        if protocol == "pointwise":
            if row["ratings"] is None:
                raise SchemaError(
                    f"prompt_id {row['prompt_id']} has no ratings to train on; give them, or set "
                    "datasets.own.protocol to pairwise"
                )
            for image, rating in zip(row["image_ids"], row["ratings"], strict=True):
                if image in readable:
                    items.append((Item(row["prompt_id"], row["prompt"], (image,), image), rating))
            continue
        for pair in row["pairs"]:
            shown = [pair["a"], pair["b"]]
            if not set(shown) <= readable:
                continue
            if stable_random("order", seed, row["prompt_id"], *sorted(shown)) % 2:
                shown.reverse()
            preferred = pair["b"] if pair["preferred"] else pair["a"]
            items.append((Item(row["prompt_id"], row["prompt"], tuple(shown), shown[1]), int(shown[1] == preferred)))
    return items


def image_reader(path: Path, cache: Path) -> Images:
    """Images of a file as engines take them; memory-mapped, so that any number fits."""
    check_schema(path, IMAGES)
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(cache), keep_in_memory=False)
    row_of = {name: row for row, name in enumerate(table["image_id"])}

    def read(name: str) -> Image.Image:
        return decoded(table[row_of[name]]["bytes"])

    return Images(dict(zip(row_of, zip(table["width"], table["height"], strict=True), strict=True)), read)


def soft_pair_accuracy(rollouts: list[dict[str, Any]], rows: list[dict[str, Any]], config: TrainGrpo) -> float:
    """Share of validation pairs that the soft score orders as the annotator did, a tied score counting as wrong."""
    answers = ANSWERS[config.model.protocol]
    scores: dict[str, list[float]] = {}
    for rollout in rollouts:
        scores.setdefault(rollout["item_id"], []).append(float(expected_answer(rollout["answer_logprobs"], answers)))
    mean = {name: float(np.mean(values)) for name, values in scores.items()}
    if config.model.protocol == "pointwise":
        return pair_accuracy(
            [[mean.get(f"{row['prompt_id']}/{image}", math.nan) for image in row["image_ids"]] for row in rows],
            [row["ranks"] for row in rows],
        )
    items = training_items(rows, {name for item in mean for name in item.split("/")[1:]}, "pairwise", config.seed)
    # A pair is a prompt of two images: the neutral 0.5 for the first and p(1) for the second.
    return pair_accuracy(
        [[0.5, mean[item.item_id]] for item, _ in items], [[target, 1 - target] for _, target in items]
    )


class ValidatingTrainer(GRPOTrainer):
    """GRPOTrainer whose `evaluate` measures what counts: the order of the images. TRL offers no hook for metrics."""

    validate: Callable[[Any], dict[str, float]]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate the current adapter; the training's random state is left as it was."""
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        with torch.random.fork_rng():
            metrics = self.validate(model)
        self.log(dict(metrics))
        model.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # TRL gives colocated vLLM the processor's tokens, several for each image, and vLLM expands the first of them again:
    # the policy would be asked another question than it is trained on (huggingface/trl#6294, open with TRL 1.16).
    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        if self.use_vllm and self.vllm_mode == "colocate":
            processor: Any = self.processing_class
            texts = processor.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
            self._questions = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return super()._tokenize_prompts(prompts)

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm and self.vllm_mode == "colocate":
            prompt_ids = self._questions
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)


class CurvesToRun(TrainerCallback):
    """Sends TRL's training curves to the stage's MLflow run."""

    def __init__(self, run: Run) -> None:
        """Curves go to `run`."""
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the curves up to the checkpoint that a resumed training starts from."""
        if state.global_step:
            self.run.metrics({"resumed_from_step": state.global_step})
        for entry in state.log_history:
            self._log(entry, entry["step"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass on what is a number."""
        self._log(kwargs["logs"], state.global_step)

    def _log(self, entry: dict[str, Any], step: int) -> None:
        self.run.metrics({k: v for k, v in entry.items() if k != "step" and isinstance(v, int | float)}, step=step)


class InEffect(TrainerCallback):
    """Refuses to train a model that is not wrapped as asked: accelerate falls back to something else in silence."""

    def __init__(self, trainer: GRPOTrainer, strategy: str | None) -> None:
        """`strategy` is None for a single process."""
        self.trainer = trainer
        self.wanted = WRAPPERS[strategy] if strategy else "PeftModel"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the classes.

        Raises:
            ProcessesError: the wrapper is another one.
        """
        found = type(self.trainer.model_wrapped)
        if self.wanted not in [cls.__name__ for cls in found.__mro__]:
            raise ProcessesError(
                f"the model in training is a {found.__name__}, but `distributed` asks for a {self.wanted}; set "
                "distributed.strategy to ddp, or, for one process, CUDA_VISIBLE_DEVICES to one GPU"
            )


def distributed_settings(config: TrainGrpo) -> dict[str, Any]:
    """TRL's settings for several processes. LoRA's base weights are frozen, so ZeRO's second stage shares what it can.

    Every adapter weight has a gradient in every step, so DDP need not look for those without.
    """
    strategy = config.distributed.strategy if config.distributed else None
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
    """TRL's settings for ours; what they mean in the paper's symbols is in docs/method.md."""
    t: Training = config.training
    completions = t.prompts_per_step * t.group_size
    processes = config.distributed.processes if config.distributed else 1
    return GRPOConfig(
        **distributed_settings(config),
        output_dir=str(folder),
        max_steps=t.steps,
        per_device_train_batch_size=completions // t.gradient_accumulation // processes,
        per_device_eval_batch_size=t.group_size,
        gradient_accumulation_steps=t.gradient_accumulation,
        num_generations=t.group_size,
        max_completion_length=t.max_completion_tokens,
        temperature=t.temperature,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.learning_rate_schedule,
        warmup_steps=t.warmup_steps,
        max_grad_norm=t.max_grad_norm,
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
    """TRL's settings for vLLM."""
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


def check_generation(config: TrainGrpo) -> None:
    """Check that what is to generate is there.

    Raises:
        PolicyError: vLLM is not in this environment.
    """
    generation = config.training.generation
    if generation.startswith("vllm") and importlib.util.find_spec("vllm") is None:
        raise PolicyError(
            f"training.{config.track}.generation is {generation}, but there is no vLLM in {sys.prefix}; set "
            "vllm_python to the interpreter of an environment with it (docs/vllm.md), or generation to transformers"
        )


@contextlib.contextmanager
def merged(model: Any, dtype: str) -> Iterator[None]:
    """Merge the adapter for the time being; afterwards the weights are the same to the last bit.

    As in `load_policy` it is merged in float32 alone: shorter types would round the weights.
    """
    if dtype != "float32":
        yield
        return
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()
        for layer, weight in zip(layers, before, strict=True):
            layer.get_base_layer().weight.data.copy_(weight)


def completions_by_engine(processor: Any, sampling: Sampling, t: Training, dtype: str) -> Callable[..., Any]:
    """TRL's hook for who generates: each prompt prefilled once for its group, finished completions dropped."""
    # A completion with the token of an image would be one image more in the passes that follow.
    placeholders = [processor.image_token_id]

    def rollout(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """Completions of conversations, which TRL repeats `group_size` times each."""
        once = prompts[:: t.group_size]
        parts = [[part for message in prompt for part in message["content"]] for prompt in once]
        inputs = processor(
            text=processor.apply_chat_template(once, add_generation_prompt=True, tokenize=False),
            images=[[part["image"] for part in own if part["type"] == "image"] for own in parts],
            padding=True,
            add_special_tokens=False,  # the chat template has them
            return_tensors="pt",
        )
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        model.eval()
        with merged(model, dtype):
            completions = sample_completions(
                model,
                inputs.to(model.device),
                t.group_size,
                sampling,
                t.max_completion_tokens,
                trainer.eos_token_ids,
                placeholders,
            )
        model.train()
        asked = [
            ids[mask == 1].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
        prompt_ids = [ids for ids in asked for _ in range(t.group_size)]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}

    return rollout


def served_folder(base: Path, processor: Any, folder: Path) -> Path:
    """Folder of the base policy with the configured image size: vLLM reads its processor from where the model is."""
    processor.save_pretrained(folder)
    for path in base.iterdir():
        if path.is_file() and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    return folder


def last_complete_checkpoint(folder: Path, processes: int = 1) -> Path | None:
    """The newest checkpoint that was written to the end: the trainer's state is written last.

    Of several processes each writes its random state by itself, perhaps later; a zip archive, readable only if whole.
    """
    complete = []
    for state in folder.glob(f"checkpoint-*/{STATE}"):
        try:
            json.loads(state.read_text())
        except ValueError:
            continue
        random_states = [state.with_name(f"rng_state_{rank}.pth") for rank in range(processes)]
        if processes == 1 or all(path.is_file() and zipfile.is_zipfile(path) for path in random_states):
            complete.append(state.parent)
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config, t = arguments.config, arguments.config.training
    with run_stage(arguments) as run:
        folder = arguments.checkpoints / run.stage_key
        folder.mkdir(parents=True, exist_ok=True)
        check_generation(config)
        strategy, processes = None, 1
        if config.distributed:
            strategy, processes = config.distributed.strategy, config.distributed.processes
        checkpoint = last_complete_checkpoint(folder, processes)
        # First of all, since it also gives this process its GPU.
        settings = grpo_config(config, folder, resumed=checkpoint is not None)
        if settings.world_size != processes:
            raise ProcessesError(
                f"the configuration asks for {processes} processes, but this is one of {settings.world_size}; start "
                f"it by torchrun --standalone --nproc-per-node {processes} -m workflow_scripts.stages.train_grpo"
            )
        rank = settings.process_index
        answers = ANSWERS[config.model.protocol]
        subsets = {"train": arguments.train, "validation": arguments.validation}
        rows = {split: read_table(path, SUBSET).to_pylist() for split, path in subsets.items()}
        images = {}
        for split, path in {"train": arguments.train_images, "validation": arguments.validation_images}.items():
            images[split] = image_reader(path, folder / "images")
        processor, base = load_processor(arguments.base, config.model), load_model(arguments.base, config.model)
        check_adapted_layers(base, t.lora.target_modules)
        if t.generation == "vllm_colocate":
            with settings.main_process_first():
                base.name_or_path = str(served_folder(base_path(arguments.base), processor, folder / "served"))
        # Every key is given: a default that changed elsewhere must not change which adapter is kept.
        sampling = Sampling(
            temperature=t.temperature,
            top_p=1.0,
            top_k=0,
            max_thinking_tokens=t.max_completion_tokens,
            max_answer_tokens=4,
        )
        usable = {}
        for split in subsets:
            sizes = images[split].sizes
            found = training_items(rows[split], set(sizes), config.model.protocol, config.seed)
            questions = [item for item, _ in found]
            long = too_long(as_policy(base, processor, config.model), questions, sizes, sampling)
            if long:
                run.warn(
                    f"{len(long)} of {len(found)} {split} questions are longer than the policy's context and are left "
                    f"out, such as {min(item.prompt_id for item in long)}"
                )
            usable[split] = [(item, target) for item, target in found if item not in long]
            if not usable[split]:
                raise SchemaError(f"{subsets[split]}: no {split} question is left; check the subset and its images")
        items, validation = usable["train"], usable["validation"]
        run.metrics({"training_items": len(items), "validation_items": len(validation)})

        def example(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
            chosen = [items[i] for i in batch["item"]]
            shown = cache(images["train"].read)  # one object for all rows that show an image: it can be processed once
            return {
                "prompt": [messages(config.model.template, item.prompt) for item, _ in chosen],
                "images": [[shown(name) for name in item.image_ids] for item, _ in chosen],
                "target": [target for _, target in chosen],
            }

        def trl_reward(name: str) -> Any:
            def reward(completions: list[Any], target: list[int], **_: Any) -> list[float]:
                texts = [completion[0]["content"] for completion in completions]
                return [REWARDS[name](text, goal, answers) for text, goal in zip(texts, target, strict=True)]

            reward.__name__ = name
            return reward

        def validate(model: Any) -> dict[str, float]:
            # Where each process has all of the model it validates its share. With fsdp every forward pass is one of all
            # processes together: each validates everything, in step with the others.
            shared = processes > 1 and strategy != "fsdp"
            mine = validation[rank::processes] if shared else validation
            with contextlib.nullcontext() if strategy == "fsdp" else merged(model, config.model.dtype):
                rollouts = list(
                    generate(
                        as_policy(model, processor, config.model),
                        [item for item, _ in mine],
                        images["validation"],
                        rollouts=t.validation_rollouts,
                        first_k=0,
                        sampling=sampling,
                        batch_items=t.prompts_per_step * t.group_size // 2,
                        seed=f"validation {config.seed}" + (f" rank {rank}" if shared and rank else ""),
                    )
                )
            if shared:
                rollouts = gather_object(rollouts)
            counts = Counter(str(rollout["sampled_answer"]) for rollout in rollouts)
            return {
                BEST: soft_pair_accuracy(rollouts, rows["validation"], config),
                "eval_forced_share": float(np.mean([rollout["forced"] for rollout in rollouts])),
                "eval_largest_answer_share": max(counts.values()) / len(rollouts),
                **{f"eval_answer_share/{answer}": counts[str(answer)] / len(rollouts) for answer in (*answers, None)},
            }

        lora = LoraConfig(
            r=t.lora.rank,
            lora_alpha=t.lora.alpha,
            lora_dropout=t.lora.dropout,
            target_modules=t.lora.target_modules,
            task_type="CAUSAL_LM",
        )
        # All processes of fsdp have to pass through the model together, in TRL's loop.
        own_loop = t.generation == "transformers" and strategy != "fsdp"
        enable_faster_passes(base, processor, sharing=t.share_prompts, decoding=own_loop)
        table = datasets.Dataset.from_dict({"item": list(range(len(items)))}).with_transform(example)
        curves = CurvesToRun(run)
        trainer = ValidatingTrainer(
            model=base,
            processing_class=processor,
            reward_funcs=[trl_reward(name) for name in type(t.rewards).model_fields],
            args=settings,
            train_dataset=table,
            eval_dataset=table.select([0]),  # asked for by the trainer; `validate` brings its own items
            peft_config=lora,
            callbacks=[curves],
            rollout_func=completions_by_engine(processor, sampling, t, config.model.dtype) if own_loop else None,
        )
        trainer.add_callback(InEffect(trainer, strategy))
        trainer.validate = validate
        if checkpoint and (state := TrainerState.load_from_json(str(checkpoint / STATE))).global_step >= t.steps:
            trainer.state = state  # the trainer would do one step more, however many it has done
            curves.on_train_begin(settings, state, trainer.control)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if not trainer.is_world_process_zero():
            return

        if trainer.state.best_model_checkpoint is None:
            raise SchemaError(
                f"{arguments.validation}: no validation pair could be judged (all tied, or no image readable); "
                "raise validation_prompts"
            )
        best = Path(trainer.state.best_model_checkpoint)
        with replacing(arguments.adapter) as temporary:
            shutil.copyfile(folder / best.name / "adapter_model.safetensors", temporary)
        adapter = json.loads((folder / best.name / "adapter_config.json").read_text())
        adapter["base_model_name_or_path"] = json.loads(arguments.base.read_text())["path"]
        write_json(arguments.adapter_config, adapter)
        # Without what differs from run to run: times, and the trainer's closing summary, which has speeds.
        entries = [entry for entry in trainer.state.log_history if "train_loss" not in entry]
        history = [{k: v for k, v in entry.items() if "time" not in k} for entry in entries]
        at_best = next(h for h in history if BEST in h and h["step"] == int(best.name.split("-")[1]))
        untrained = next(h[BEST] for h in history if BEST in h and h["step"] == 0)
        if at_best[BEST] <= untrained:
            run.warn(
                f"{config.track}, seed {config.seed}: no adapter validates better than the base policy "
                f"({at_best[BEST]:.3f} against {untrained:.3f})"
            )
        collapsed = at_best["eval_largest_answer_share"] > t.collapse_share
        if collapsed:
            run.warn(
                f"{config.track}, seed {config.seed}: the policy has collapsed, one answer makes up "
                f"{at_best['eval_largest_answer_share']:.0%} of its validation rollouts"
            )
        write_json(
            arguments.record,
            {
                "best_step": at_best["step"],
                "best_soft_pair_accuracy": at_best[BEST],
                "untrained_soft_pair_accuracy": untrained,
                "collapsed": collapsed,
                "history": history,
            },
        )
        run.metrics({"best_step": at_best["step"], "best_soft_pair_accuracy": at_best[BEST], "collapsed": collapsed})
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
