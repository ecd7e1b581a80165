"""Time, peak memory and tokens of the phases of a training and of rollouts, measured as they run."""

import contextlib
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback

from workflow_scripts.training.trainer import ValidatingTrainer
from workflow_scripts.training.validation import Validation


@dataclass
class Measured:
    """What a phase took: seconds, peak bytes of the device's memory, and tokens."""

    seconds: float = 0.0
    peak: int = 0
    tokens: float = 0.0


@dataclass
class Meter:
    """Measures phases, one at a time: within another phase the outer one does not count.

    On a CPU seconds are those of the process, divided by its threads, so that what other processes do meanwhile does
    not count, and the peak is that of the process so far.
    """

    device: str
    threads: int
    phases: dict[str, Measured] = field(default_factory=lambda: defaultdict(Measured))
    now: str | None = None
    counts: bool = True
    """False while phases only warm up."""
    _since: float = 0.0

    def clock(self) -> float:
        """Seconds until all that was launched is done."""
        if self.device == "cpu":
            return time.process_time() / self.threads
        torch.cuda.synchronize()
        return time.perf_counter()

    def turn(self, name: str | None) -> None:
        """End the phase that runs now, and begin another one, or none."""
        at = self.clock()
        if self.now and self.counts:
            measured = self.phases[self.now]
            measured.seconds += at - self._since
            measured.peak = max(measured.peak, self._peak())
        self.now, self._since = name, at

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Measured]:
        """Measure a phase within the one that runs now; where it fails, `now` names it."""
        outer = self.now
        self.turn(name)
        yield self.phases[name]
        self.turn(outer)

    def _peak(self) -> int:
        if self.device == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


class MeasuredTrainer(ValidatingTrainer):
    """The trainer of a training, which tells a meter when generation and scoring by the reference policy begin."""

    meter: Meter

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("generation"):
            return super()._generate(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Score completions: under the reference policy, unless it is for the loss, which needs gradients."""
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self.meter.phase("reference"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)


class AfterWarmUp(TrainerCallback):
    """Leaves out the first steps, which compile kernels and fill caches, and ends the measurement after the last."""

    def __init__(self, meter: Meter, trainer: MeasuredTrainer, steps: int, ends: list[int]) -> None:
        """`steps` warm up; from then on the tokens `ends` end a completion."""
        self.meter, self.trainer, self.steps, self.ends = meter, trainer, steps, ends

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin or end the measurement."""
        if state.global_step == self.steps:
            self.meter.turn("update")
            self.meter.counts = True
            self.trainer.eos_token_ids = self.ends
        elif state.global_step == state.max_steps:
            self.meter.turn(None)


@dataclass(frozen=True)
class CountedValidation(Validation):
    """A validation that counts the tokens of its rollouts."""

    lengths: list[int] = field(default_factory=list)

    def _rollouts(self, model: Any) -> list[dict[str, Any]]:
        rollouts = super()._rollouts(model)
        self.lengths.extend(len(rollout["completion_ids"]) for rollout in rollouts)
        return rollouts
