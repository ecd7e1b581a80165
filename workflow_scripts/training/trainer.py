"""TRL's GRPO trainer with a validation of its own, and the callbacks of a training."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl
from trl import GRPOTrainer

from workflow_scripts.training.settings import ProcessesError
from workflow_scripts.training.vllm_generation import VllmTrainer

# Class of the wrapped model in training; a single process trains the PeftModel itself.
WRAPPERS = {None: "PeftModel", "ddp": "DistributedDataParallel", "fsdp": "FSDPModule", "deepspeed": "DeepSpeedEngine"}


class ValidatingTrainer(VllmTrainer):
    """GRPOTrainer whose `evaluate` measures the order of images. TRL offers no hook for metrics."""

    control: TrainerControl

    def __init__(self, *, validate: Callable[[Any], dict[str, float]], **options: Any) -> None:
        """`validate` returns the metrics of a model; `options` are those of `GRPOTrainer`."""
        super().__init__(**options)
        self.validate = validate

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate the current adapter, and leave the random state of the training as it was."""
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        with torch.random.fork_rng():
            metrics = self.validate(model)
        self.log(dict(metrics))
        model.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


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
