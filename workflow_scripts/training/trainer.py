"""TRL's GRPO trainer with a validation of its own, and the callbacks of a training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl
from trl import GRPOTrainer

from workflow_scripts.training.checkpoints import step_of
from workflow_scripts.training.rewards import answer_advantage
from workflow_scripts.training.settings import DIFFERENCE, ProcessesError
from workflow_scripts.training.validation import Credit
from workflow_scripts.training.vllm_generation import VllmTrainer

CREDIT = "eval_credit_by_prompt"  # in the trainer's log, which checkpoints keep

# Class of the wrapped model in training; a single process trains the PeftModel itself.
WRAPPERS = {None: "PeftModel", "ddp": "DistributedDataParallel", "fsdp": "FSDPModule", "deepspeed": "DeepSpeedEngine"}


class ValidatingTrainer(VllmTrainer):
    """GRPOTrainer whose `evaluate` measures the order of images, and which compares sampled with scored probabilities.

    TRL offers no hook for metrics.
    """

    control: TrainerControl

    resumed_from = 0
    """Step of the checkpoint from which the training goes on."""

    def __init__(
        self,
        *,
        validate: Callable[[Any, Credit | None], tuple[dict[str, float], Credit]],
        answer_of: Mapping[int, int],
        **options: Any,
    ) -> None:
        """Make the trainer.

        Args:
            validate: returns the metrics of a model and the credit of the prompts, given that of the untrained policy.
            answer_of: answer by token, in ascending order of the answers.
            options: those of `GRPOTrainer`.
        """
        super().__init__(**options)
        self.validate = validate
        self.answer_of = answer_of

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """Train, from a checkpoint on if one is named."""
        if resume_from_checkpoint:
            self.resumed_from = step_of(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **options)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate the current adapter, and leave the random state of the training as it was."""
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        history: list[dict[str, Any]] = self.state.log_history
        untrained = next((entry[CREDIT] for entry in history if CREDIT in entry), None)
        with torch.random.fork_rng():
            metrics, credit = self.validate(model, untrained)
        self.log(dict(metrics))
        history[-1][CREDIT] = credit  # afterwards, since it is too long to be printed
        model.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollouts; where distributions of answers were recorded, with answer tokens credited for themselves.

        TRL takes advantages of shape (completions, tokens) from subclasses.
        """
        outputs: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if "answer_position" in inputs[0]:
            ids, answers = outputs["completion_ids"], tuple(self.answer_of.values())
            weights = dict(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
            advantages = outputs["advantages"][:, None].repeat(1, ids.shape[1])
            for row, item in enumerate(inputs):
                if (position := item["answer_position"]) is not None:
                    answer = self.answer_of.get(ids[row, position].item())
                    advantages[row, position] += answer_advantage(
                        weights, item["answer_logprobs"], answer, item["target"], answers
                    )
            outputs["advantages"] = advantages
        return outputs

    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> Any:
        scored = super()._get_per_token_logps_and_entropies(*args, **options)
        self._scored = scored[0].detach()
        return scored

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        if "sampling_per_token_logps" in inputs and not self.use_vllm:
            self._log_difference(inputs)
        return loss

    def _log_difference(self, inputs: dict[str, Any]) -> None:
        """Log how far the log-probabilities at sampling are from TRL's, under the names that TRL uses for vLLM.

        The pass of the loss is that of the policy that sampled, unless TRL scored the completions before (`old`).
        """
        scored = inputs.get("old_per_token_logps", self._scored)
        difference = (scored - inputs["sampling_per_token_logps"]).abs() * inputs["completion_mask"]
        sums = torch.stack([difference.sum(), inputs["completion_mask"].sum().float(), difference.max()])
        total, count, largest = self.accelerator.gather(sums[None]).unbind(1)
        metrics = self._metrics["train"]
        metrics[f"{DIFFERENCE}/mean"].append((total.sum() / count.sum()).item())
        metrics[f"{DIFFERENCE}/max"] = [max([*metrics[f"{DIFFERENCE}/max"], largest.max().item()])]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's sampler, which shuffles anew in each pass; a resumed training goes on with the order of its pass."""
        sampler: Any = super()._get_train_sampler(dataset)
        steps = sampler.num_samples // sampler.batch_size * self.num_iterations
        for _ in range(self.resumed_from // steps):
            next(iter(sampler))
        return sampler


class Curves(TrainerCallback):
    """Passes TRL's training curves on, for example to MLflow."""

    def __init__(self, log: Callable[..., None]) -> None:
        """`log` takes numbers by name and, as a keyword, their `step`."""
        self.log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the curves up to the checkpoint from which a training resumes."""
        if state.global_step:
            self.log({"resumed_from_step": state.global_step})
        for entry in state.log_history:
            self._log(entry, entry["step"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass on the numbers of a step."""
        self._log(kwargs["logs"], state.global_step)

    def _log(self, entry: dict[str, Any], step: int) -> None:
        self.log({k: v for k, v in entry.items() if k != "step" and isinstance(v, int | float)}, step=step)


class CheckWrapper(TrainerCallback):
    """Refuses to train a model that is not wrapped as configured: accelerate silently falls back to another wrapper."""

    def __init__(self, trainer: GRPOTrainer, strategy: str | None) -> None:
        """`strategy` is None for a single process."""
        self.trainer = trainer
        self.wanted = WRAPPERS[strategy]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the classes.

        Raises:
            ProcessesError: the model is wrapped by another class.
        """
        found = type(self.trainer.model_wrapped)
        if self.wanted not in [cls.__name__ for cls in found.__mro__]:
            raise ProcessesError(
                f"the model in training is a {found.__name__}, but `distributed` asks for a {self.wanted}; set "
                "distributed.strategy to ddp, or, for one process, CUDA_VISIBLE_DEVICES to one GPU"
            )
