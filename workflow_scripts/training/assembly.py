"""The trainer of a training, put together from its questions, its validation and TRL's settings."""

from typing import Any, TypeVar

from trl import GRPOConfig

from workflow_scripts.policy.fast.enable import enable_faster_passes
from workflow_scripts.preferences.images import Images
from workflow_scripts.rollouts.items import Item
from workflow_scripts.training.generation import engine_completions, engine_generates
from workflow_scripts.training.items import trl_dataset
from workflow_scripts.training.rewards import trl_reward
from workflow_scripts.training.settings import lora_config, strategy_of
from workflow_scripts.training.trainer import CheckWrapper, ValidatingTrainer
from workflow_scripts.training.validation import Validation

Trainer = TypeVar("Trainer", bound=ValidatingTrainer)


def grpo_trainer(
    kind: type[Trainer],
    settings: GRPOConfig,
    items: list[tuple[Item, int]],
    images: Images,
    validation: Validation,
    **options: Any,
) -> Trainer:
    """Return a trainer of this class for the policy of `validation`, which is adapted and made faster in place.

    Args:
        kind: class of the trainer.
        settings: of TRL.
        items: questions to train on, with their targets.
        images: their images.
        validation: the policy, how it is sampled, and what it is validated on.
        options: further ones of the trainer, such as callbacks.
    """
    config, policy, t = validation.config, validation.policy, validation.config.training
    model, processor = policy.model, policy.processor
    shown = t.prompts_per_step * config.model.template.count("{image}")
    decoding = engine_generates(config)
    enable_faster_passes(model, processor, sharing=t.share_prompts, decoding=decoding, step_images=shown)
    dataset = trl_dataset(items, images, config.model.template, t.prompts_per_step)
    rollout: Any = engine_completions(config, processor, validation.sampling) if decoding else None
    trainer = kind(
        model=model,
        processing_class=processor,
        reward_funcs=[trl_reward(name, policy.answers, t.reward_signal) for name in type(t.rewards).model_fields],
        args=settings,
        train_dataset=dataset,
        eval_dataset=dataset.select([0]),  # the trainer asks for one; `validate` brings its own items
        peft_config=lora_config(t.lora),
        rollout_func=rollout,
        validate=validation,
        answer_of=dict(zip(policy.answer_token_ids, policy.answers, strict=True)),
        **options,
    )
    trainer.add_callback(CheckWrapper(trainer, strategy_of(config)))
    return trainer
