"""One step of the stage's trainer on a given batch, in one process or in several (torchrun): gradients and weights.

python first_update.py MANIFEST FOLDER PROCESSES STRATEGY PASSES writes FOLDER/<processes>-<rank>.pt; with PASSES
shared, not plain, the model computes each prompt once for its group. The completions are
chosen here and not sampled, by image and by place in the group, so that any number of processes sees the same ones.
"""

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerCallback

from workflow_scripts.configuration.model import Distributed, load
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.policy.fast.enable import share_prompts
from workflow_scripts.policy.loading import load_model, load_processor
from workflow_scripts.policy.prompts import messages
from workflow_scripts.preferences.synthetic_scenes import draw, sample_prompt, sample_scene
from workflow_scripts.training.settings import grpo_config, lora_config
from workflow_scripts.training.trainer import CheckWrapper, ValidatingTrainer

ITEMS, GROUP = 4, 4
SMALL = {"steps": 1, "prompts_per_step": ITEMS, "group_size": GROUP, "warmup_steps": 0, "max_grad_norm": 1e9}
SMALL |= {"learning_rate": 1e-3, "reward_signal": "sampled", "scale_rewards": "group"}


class Gradients(TrainerCallback):
    """Keeps the gradient of the step before the optimizer uses it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.requires_grad}


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def main() -> None:
    manifest, folder, processes, strategy = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    config = TrainGrpo.of(load({"training": {"imagereward": SMALL}}), "imagereward", 0)
    if processes > 1:  # not by `load`, which refuses more than the trainer does
        distributed = Distributed.model_validate({"processes": processes, "strategy": strategy})
        config = config.model_copy(update={"distributed": distributed})
    settings = grpo_config(config, folder / f"checkpoints-{processes}", resumed=True)
    processor, base = load_processor(manifest, config.model), load_model(manifest, config.model)
    if sys.argv[5] == "shared":
        share_prompts(base)
    rng = random.Random(0)
    scenes = [sample_scene(rng, *sample_prompt(rng, test=False)) for _ in range(ITEMS)]

    def example(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        return {
            "prompt": [messages(config.model.template, scenes[i].prompt) for i in batch["item"]],
            "images": [[draw(scenes[i])] for i in batch["item"]],
            "target": [1 + i for i in batch["item"]],
        }

    def chosen(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        seen: Counter[str] = Counter()
        completions = []
        for prompt in prompts:
            image = next(part["image"] for part in prompt[0]["content"] if part["type"] == "image")
            number = sum(image.tobytes()) + seen[name := image.tobytes().hex()]
            seen[name] += 1
            text = f"<think>{'a red circle ' * (1 + number % 3)}</think><answer>{1 + number % 7}</answer>"
            completions.append([*processor.tokenizer.encode(text), processor.tokenizer.eos_token_id])
        assert set(seen.values()) == {GROUP}
        ids = processor.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs={"padding": False}
        )["input_ids"]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    def nearness(completions: list[Any], target: list[int], **_: Any) -> list[float]:
        answers = [int(c[0]["content"].partition("<answer>")[2][0]) for c in completions]
        lengths = [len(c[0]["content"]) for c in completions]
        return [-abs(a - goal) - length / 100 for a, goal, length in zip(answers, target, lengths, strict=True)]

    table = datasets.Dataset.from_dict({"item": list(range(ITEMS))}).with_transform(example)
    settings.reward_weights = None
    trainer = ValidatingTrainer(
        model=base,
        processing_class=processor,
        reward_funcs=[nearness],
        args=settings,
        train_dataset=table,
        eval_dataset=table.select([0]),
        peft_config=lora_config(config.training.lora),
        rollout_func=chosen,
        callbacks=[gradients := Gradients()],
        validate=lambda model, untrained: ({"eval_soft_pair_accuracy": 0.0}, []),
        answer_of={},
    )
    trainer.add_callback(CheckWrapper(trainer, strategy if processes > 1 else None))
    before = adapter(base)
    trainer.train()
    found = {
        "world_size": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "wrapper": type(trainer.model_wrapped).__name__,
        "before": before,
        "gradients": gradients.found,
        "after": adapter(base),
        "reward": next(entry["reward"] for entry in trainer.state.log_history if "reward" in entry),
    }
    torch.save(found, folder / f"{processes}-{settings.process_index}.pt")


if __name__ == "__main__":
    main()
