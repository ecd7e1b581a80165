"""One real step of each phase of a configuration, at its sizes, on its device."""

import gc
import importlib.util
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from workflow_scripts.configuration.model import Configuration, Dataset, PolicyName, Track, Training
from workflow_scripts.configuration.stages import ModelConfig, TrainGrpo
from workflow_scripts.configuration.targets import measured
from workflow_scripts.planning.costs import Length
from workflow_scripts.planning.plan import Plan, Stage, completion_length, remedy
from workflow_scripts.planning.workload import Questions, questions
from workflow_scripts.policy.loading import Policy, as_policy, check_adapted_layers, ready_policy
from workflow_scripts.preflight.asked import asked
from workflow_scripts.preflight.measuring import AfterWarmUp, CountedValidation, Measured, MeasuredTrainer, Meter
from workflow_scripts.preflight.untrained import Source, ending_tokens
from workflow_scripts.rollouts import vllm_engine
from workflow_scripts.rollouts.items import Item, anchor_items, pointwise_items
from workflow_scripts.rollouts.transformers_engine import generate
from workflow_scripts.training.assembly import grpo_trainer
from workflow_scripts.training.epochs import optimizer_steps
from workflow_scripts.training.items import Split, training_items
from workflow_scripts.training.sampling import as_in_training
from workflow_scripts.training.settings import grpo_config

PHASES = ("loading", "generation", "reference", "update", "validation")  # of a training, in their order
BATCHES = {"cpu": 3, "cuda": 1}  # of each kind that are measured; on a CPU they are short, and others disturb them
WARM_UP = 8  # tokens of a completion of random weights while kernels are compiled


@dataclass
class Checked:
    """What was measured of one track."""

    track: Track
    phases: dict[str, Measured] = field(default_factory=dict)
    repeats: dict[str, float] = field(default_factory=dict)
    """How often a training runs each phase; of rollouts the items in the batch."""
    completions: str = ""
    misfits: list[str] = field(default_factory=list)


Case = tuple[Track, str, Dataset]  # a track, a policy of it, and what the policy is tested on
Work = Callable[[Source, Plan, Case, float, Meter, Checked], None]


def check_track(source: Source, p: Plan, track: Track, room: float, start: float) -> Checked:
    """Measure a training step, a validation batch, and a batch of rollouts of each policy.

    Args:
        source: of the policy.
        p: the plan.
        track: whose training and rollouts.
        room: bytes of the device's memory; what does not fit is told with the key to lower, and the rest is measured.
        start: seconds of a job before it loads its policy.
    """
    c, found = source.configuration, Checked(track)
    t: Training = getattr(c.training, track)
    length = completion_length(c, p.assumed, track, t.max_completion_tokens)
    mean = f"end at random after {length.mean:.0f} tokens on average" if source.random else "are the policy's own"
    found.completions = f"completions {mean}, at most {t.max_completion_tokens}"
    tested: dict[PolicyName, Dataset] = {}
    for case_track, policy, test, *_ in measured(c):
        if case_track == track:
            tested.setdefault(policy, test)
    works: list[tuple[Work, PolicyName, Dataset, bool]] = [
        (_rollouts, policy, test, c.rollouts.engine == "vllm") for policy, test in tested.items()
    ]
    if "grpo" in tested:
        works.insert(0, (_training, "grpo", track, t.generation == "vllm_colocate"))
    for work, policy, test, by_vllm in works:
        measuring = partial(measure, work, source, p, (track, policy, test), room)
        one = in_own_process(measuring) if by_vllm else measuring()
        for name in one.phases:
            one.phases[name].seconds += start * name.startswith("loading")
        found.phases = one.phases | found.phases
        found.repeats |= one.repeats
        found.misfits += one.misfits
    found.phases = {name: found.phases[name] for name in [*PHASES, *found.phases] if name in found.phases}
    return found


def measure(work: Work, source: Source, p: Plan, case: Case, room: float) -> Checked:
    """Measure the work of one job, and tell what does not fit."""
    c = source.configuration
    found, meter = Checked(case[0]), Meter(c.policy.device, c.numeric_threads)
    with memory_told(found, meter, p, room):
        work(source, p, case, room, meter, found)
    found.phases = dict(meter.phases)
    return found


def in_own_process(measuring: Callable[[], Checked]) -> Checked:
    """Measure in a process of its own, as a job is: vLLM keeps memory of the GPU as long as its process lives."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measuring).result()


@contextmanager
def memory_told(found: Checked, meter: Meter, p: Plan, room: float) -> Iterator[None]:
    """Tell which phase ran out of memory and what to lower, and free what it held."""
    try:
        yield
    except (torch.OutOfMemoryError, ValueError) as error:
        if "memory" not in str(error):
            raise
        phase, c = meter.now or "loading", p.configuration
        stage, name = stage_of(p, found.track, phase), phase.split()[0]
        if isinstance(error, ValueError):  # by vLLM, which asks for more memory or for less
            key = f"training.{found.track}" if stage.name.startswith("train_grpo") else "rollouts"
            found.misfits.append(
                f"{stage.name}, {phase}: vLLM does not start ({error}); change {key}.vllm.gpu_memory_utilization"
            )
        else:
            planned = {"reference": "update", "loading": next(iter(stage.memory))}.get(name, name)
            told = str(error).split(". ")[0]
            lower = remedy(c, stage, planned, stage.memory[planned], room)
            found.misfits.append(f"{stage.name}, {phase}: does not fit ({told}); {lower}")
        meter.phases.pop(phase, None)
        meter.now = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def stage_of(p: Plan, track: Track, phase: str) -> Stage:
    """Return the stage of a track that a phase belongs to; loading belongs to the first."""
    stages = [stage for stage in p.stages if stage.name.split()[1] == track]
    if "rollouts" not in phase:
        return stages[0]
    return next(s for s in stages if s.name.startswith(f"generate_rollouts {track} {phase.split()[-1]} "))


def one_process(config: TrainGrpo, steps: int) -> TrainGrpo:
    """Return the share of one process of a training, for some steps without validation."""
    t, processes = config.training, config.distributed.processes if config.distributed else 1
    changed: dict[str, Any] = {"steps": steps, "epochs": None, "validate_every": steps + 1, "warmup_steps": 0}
    changed["prompts_per_step"] = max(1, t.prompts_per_step // processes)
    return config.model_copy(update={"training": t.model_copy(update=changed), "distributed": None})


def _training(source: Source, p: Plan, case: Case, room: float, meter: Meter, found: Checked) -> None:
    """Train: one generation to warm up, then those that are measured, and all steps on each; validate one batch."""
    c, (track, *_) = source.configuration, case
    t: Training = getattr(c.training, track)
    cycles = BATCHES[c.policy.device]
    config = one_process(TrainGrpo.of(c, track, c.seeds[0]), (1 + cycles) * t.num_iterations)
    length = completion_length(c, p.assumed, track, t.max_completion_tokens)
    step_items = config.training.prompts_per_step
    train, validation = (questions(c, source.reader, track, track, split) for split in ("train", "validation"))
    with meter.phase("loading"):
        base = source.base(track, length)
    model, processor = base.model, base.processor
    config = config.model_copy(update={"model": base.config})
    check_adapted_layers(model, t.lora.target_modules)
    if t.generation == "vllm_colocate":
        model.name_or_path = str(source.served(base))
    policy, sampling = as_policy(model, processor, base.config), as_in_training(t.temperature, t.max_completion_tokens)

    def split(name: Any, planned: Questions, n: int) -> tuple[Split, Any]:
        made = asked(c, base.config, processor, not source.random, track, name, planned, n)
        items = training_items(made.rows, set(made.images.sizes), base.config.protocol, config.seed)
        return Split(name, Path(), made.rows, made.images), items[:n]

    shown, items = split("train", train, (1 + cycles) * step_items)
    batch = min(step_items * t.group_size // 2, round(validation.items))
    held_out, validated = split("validation", validation, min(cycles * batch, round(validation.items)))
    settings = grpo_config(config, source.folder / track, resumed=True)  # no validation at the start
    settings.eval_strategy = settings.save_strategy = "no"
    validate = CountedValidation(config, policy, held_out, validated, sampling, 0)
    with meter.phase("loading"):
        trainer = grpo_trainer(MeasuredTrainer, settings, items, shown.images, validate)
    adapted: Any = trainer.model
    adapted.save_pretrained(source.folder / track / "adapter")
    trainer.meter = meter
    ends = trainer.eos_token_ids
    if source.random:
        vocabulary = model.config.get_text_config().vocab_size
        trainer.eos_token_ids = ending_tokens(vocabulary, Length(min(WARM_UP, length.mean), length.longest), set())
    trainer.add_callback(AfterWarmUp(meter, trainer, t.num_iterations, ends))
    steps = optimizer_steps(t, train.items)
    generations, validations = steps / t.num_iterations, 1 + math.ceil(steps / t.validate_every)
    found.repeats |= {"generation": generations, "reference": generations, "update": steps}
    found.repeats["validation"] = validations * validation.items / batch

    with memory_told(found, meter, p, room):
        meter.counts = False
        meter.turn("update")
        trainer.train()
        _divide(trainer, meter, cycles, t.num_iterations, step_items * t.group_size)
    if trainer.state.global_step < settings.max_steps:
        meter.phases.pop("update", None)  # that of a part of a step
    meter.counts = True
    with meter.phase("validation") as validating:
        trainer.evaluate()
    validating.seconds /= len(validated) / batch
    validating.tokens = sum(validate.lengths) / (len(validated) / batch)


def _divide(trainer: MeasuredTrainer, meter: Meter, cycles: int, iterations: int, completions: int) -> None:
    """Divide what was measured by the number of generations and of steps, and take the tokens from TRL's log."""
    logged = [entry for entry in trainer.state.log_history if "num_tokens" in entry]
    lengths = [entry["completions/mean_length"] for entry in logged[iterations::iterations]]
    processed = (logged[-1]["num_tokens"] - logged[iterations - 1]["num_tokens"]) / cycles
    tokens = {"generation": sum(lengths) / cycles * completions, "reference": processed, "update": processed}
    for name in meter.phases.keys() & tokens.keys():
        meter.phases[name].seconds /= cycles * (iterations if name == "update" else 1)
        meter.phases[name].tokens = tokens[name]


def _rollouts(source: Source, p: Plan, case: Case, room: float, meter: Meter, found: Checked) -> None:
    """Generate one batch of rollouts, with an adapter for a trained policy."""
    (track, policy_name, test), c = case, source.configuration
    r = c.rollouts
    budget = r.sampling.max_thinking_tokens + r.sampling.max_answer_tokens
    tests = questions(c, source.reader, track, test, "test")
    name = f"rollouts {policy_name}"
    length, by_vllm = completion_length(c, p.assumed, track, budget), r.engine == "vllm"
    adapter = source.folder / track / "adapter"
    trained = policy_name == "grpo" and adapter.is_dir()  # it is not there where the training could not be loaded
    meter.turn(f"loading {name}" if by_vllm else "loading")
    policy: Policy
    config: ModelConfig
    if by_vllm:
        policy, config = source.in_vllm(track, length, adapter if trained else None)
    else:
        model, processor, config = source.base(track, length)
        policy = ready_policy(model, processor, adapter if trained else None, config, "run check-gpu again")
    batch = min(r.batch_items, round(tests.items))
    number = min(BATCHES[c.policy.device] * batch, round(tests.items))
    made = asked(c, config, policy.processor, not source.random, test, "test", tests, number)
    if config.protocol == "pointwise":
        items: list[Item] = pointwise_items(made.rows, set(made.images.sizes))
    else:
        items = anchor_items(made.rows, set(made.images.sizes), c.seeds[0], r.both_orders)
    meter.turn(None)
    with meter.phase(name) as measured_rollouts:
        rollouts = list(
            (vllm_engine.generate if by_vllm else generate)(
                policy,
                items[:number],
                made.images,
                rollouts=r.block_size,
                first_k=0,
                sampling=r.sampling,
                batch_items=r.batch_items,
                seed="check-gpu",
            )
        )
    measured_rollouts.seconds /= number / batch
    measured_rollouts.tokens = sum(len(rollout["completion_ids"]) for rollout in rollouts) / (number / batch)
    found.repeats[name] = batch


def without_vllm(c: Configuration) -> tuple[Configuration, list[str]]:
    """Put transformers in the place of vLLM where it is not here or is a server, and say so."""
    here = importlib.util.find_spec("vllm") is not None
    missing = f"no vLLM in {c.vllm_python}: make vllm-{'cpu' if c.policy.device == 'cpu' else 'gpu'}"
    told: dict[str, str] = {}
    training, rollouts = c.training, c.rollouts
    for track in c.tracks:
        t: Training = getattr(training, track)
        if t.generation == "vllm_server" or (t.generation == "vllm_colocate" and not here):
            told[f"training.{track}.generation"] = "a server is not measured" if here else missing
            training = training.model_copy(update={track: t.model_copy(update={"generation": "transformers"})})
    if rollouts.engine == "vllm" and not here:
        told["rollouts.engine"] = missing
        rollouts = rollouts.model_copy(update={"engine": "transformers"})
    return c.model_copy(update={"training": training, "rollouts": rollouts}), [
        f"{key} is vLLM: transformers was measured and planned in its place ({why})" for key, why in told.items()
    ]
