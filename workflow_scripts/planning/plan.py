"""The plan of a configuration: what every stage does, needs and costs on a GPU, and what does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from workflow_scripts.configuration.model import Configuration, Dataset, Split, Track, Training
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.configuration.targets import measured, shards
from workflow_scripts.planning.artifacts import Artifact, artifacts
from workflow_scripts.planning.costs import (
    Cost,
    Length,
    image_seconds,
    loading_cost,
    rollout_cost,
    training_costs,
    vllm_cost,
)
from workflow_scripts.planning.devices import CPU, FACTS, GIGABYTE, Assumptions, Gpu
from workflow_scripts.planning.memory import Model, rollout_memory, training_memory
from workflow_scripts.planning.tokens import read_policy
from workflow_scripts.planning.workload import Questions, questions
from workflow_scripts.training.epochs import optimizer_steps


@dataclass(frozen=True)
class Stage:
    """One stage instance of the plan: a training, or all rollouts of a policy on a test set."""

    name: str
    jobs: int
    asked: Questions
    rollouts: float
    prompt_tokens: float
    completion_tokens: float
    at_most: float  # completion tokens
    memory: dict[str, dict[str, float]]  # bytes, by phase and part
    costs: dict[str, Cost]  # expected, by phase
    highest: Cost  # with completions that use up their budget


@dataclass(frozen=True)
class Plan:
    """All that is reported."""

    configuration: Configuration
    model: Model
    gpu: Gpu
    assumed: Assumptions
    stages: list[Stage]
    artifacts: list[Artifact]
    warnings: list[str]


def plan(c: Configuration, gpu: Gpu, assumed: Assumptions) -> Plan:
    """Plan a configuration on a GPU.

    Raises:
        PlanError: the policy is not known, or data are not here.
    """
    reader = read_policy(c)

    @cache
    def asked(track: Track, dataset: Dataset, split: Split) -> Questions:
        return questions(c, reader, track, dataset, split)

    models, stages = dict[Any, Model](), []
    for track in c.tracks:
        lora = getattr(c.training, track).lora
        models[track] = Model(reader.architecture, c.policy.dtype, c.policy.attention, lora.rank, lora.target_modules)
        if c.trains():
            train, validation = asked(track, track, "train"), asked(track, track, "validation")
            stages.append(training_stage(c, models[track], gpu, assumed, track, train, validation))
    for track, policy, test in dict.fromkeys(case[:3] for case in measured(c)):
        stages.append(test_stage(c, models[track], gpu, assumed, asked(track, test, "test"), (track, policy, test)))
    made = artifacts(c, models, {stage.name: stage.completion_tokens for stage in stages})
    told = [
        *too_small_shares(c, stages, gpu),
        *misfits(c, stages, gpu, assumed),
        *outside_the_language_model(models if c.trains() else {}),
    ]
    return Plan(c, models[c.tracks[0]], gpu, assumed, stages, made, told)


def training_stage(
    c: Configuration, m: Model, gpu: Gpu, assumed: Assumptions, track: Track, train: Questions, validation: Questions
) -> Stage:
    """Plan the training of a track."""
    t: Training = getattr(c.training, track)
    length = completion_length(c, assumed, track, t.max_completion_tokens)
    whole = Length(t.max_completion_tokens, t.max_completion_tokens)
    steps = optimizer_steps(t, train.items)
    costs, highest = (
        training_costs(m, gpu, assumed, t, steps, c.distributed, train, validation, n) for n in (length, whole)
    )
    completions = steps * t.prompts_per_step * t.group_size / t.num_iterations
    return Stage(
        name=f"train_grpo {track}",
        jobs=len(c.seeds),
        asked=train,
        rollouts=completions,
        prompt_tokens=completions * train.mean,
        completion_tokens=completions * length.mean,
        at_most=completions * t.max_completion_tokens,
        memory=training_memory(m, gpu, t, c.distributed, train, validation),
        costs=costs,
        highest=sum(highest.values(), Cost(0, 0)),
    )


def test_stage(
    c: Configuration, m: Model, gpu: Gpu, assumed: Assumptions, tested: Questions, case: tuple[Track, str, Dataset]
) -> Stage:
    """Plan the rollouts of a policy on a test set; `case` names track, policy and test set."""
    (track, policy, test), r = case, c.rollouts
    # A published adapter is planned as large as a trained one.
    trained = policy == "grpo" or bool(c.policy.source == "hub" and c.policy.hub.adapter)
    budget = r.sampling.max_thinking_tokens + r.sampling.max_answer_tokens
    length = completion_length(c, assumed, track, budget)

    vllm = r.engine == "vllm"
    eager = r.vllm.enforce_eager or gpu.name == CPU
    jobs = len(shards(c, test)) * r.blocks

    def costs(completion: Length) -> dict[str, Cost]:
        if vllm:
            share, batch = r.vllm.gpu_memory_utilization, r.batch_items
            asked = (m, gpu, assumed, tested, tested.items, batch, r.block_size, completion)
            generated = vllm_cost(*asked, share, trained, eager)
        else:
            beside = trained and m.dtype != "float32"
            generated = rollout_cost(m, gpu, assumed, tested, r.batch_items, r.block_size, completion, beside)
        return {
            "rollouts": generated.times(r.blocks),
            "images": Cost(0, tested.items * image_seconds(tested.images, 1)).times(r.blocks),
            "loading": loading_cost(m, assumed, vllm, policies=not vllm, eager=eager).times(jobs),
        }

    rollouts = tested.items * r.block_size * r.blocks
    return Stage(
        name=f"generate_rollouts {track} {policy} on {test}",
        jobs=jobs * len(c.seeds),
        asked=tested,
        rollouts=rollouts,
        prompt_tokens=tested.tokens * r.blocks,
        completion_tokens=rollouts * length.mean,
        at_most=rollouts * budget,
        memory={"rollouts": rollout_memory(m, gpu, r, tested, trained)},
        costs=costs(length),
        highest=sum(costs(Length(budget, budget)).values(), Cost(0, 0)),
    )


def completion_length(c: Configuration, assumed: Assumptions, track: Track, budget: int) -> Length:
    """Mean and longest completion: measured of the bundled policy, else a share of the budget, and all of it."""
    if c.policy.source == "hub":
        return Length(assumed.completion_share * budget, budget)
    known = FACTS["bundled_completions"][ModelConfig.of(c, track).protocol]
    return Length(min(known["mean"], budget), min(known["longest"], budget))


def too_small_shares(c: Configuration, stages: list[Stage], gpu: Gpu) -> Iterator[str]:
    """Shares of the GPU with which vLLM would not start."""
    for stage in stages:
        needed = max(parts.get("vLLM", 0.0) for parts in stage.memory.values())
        track = stage.name.split()[1]
        training = stage.name.startswith("train_grpo")
        section, vllm = (
            (f"training.{track}", getattr(c.training, track).vllm) if training else ("rollouts", c.rollouts.vllm)
        )
        if needed > vllm.gpu_memory_utilization * gpu.memory:
            yield (
                f"{stage.name}: vLLM needs {needed / GIGABYTE:.1f} GB for weights, workspace and one sequence, more "
                f"than its share of {gpu.name}; raise {section}.vllm.gpu_memory_utilization "
                f"({vllm.gpu_memory_utilization:g})"
            )


def misfits(c: Configuration, stages: list[Stage], gpu: Gpu, assumed: Assumptions) -> Iterator[str]:
    """What does not fit into the memory, each with the key to change."""
    room = gpu.memory * (1 - assumed.memory_reserved)
    for stage in stages:
        for phase, parts in stage.memory.items():
            needed = sum(parts.values())
            if needed > room:
                yield (
                    f"{stage.name}, {phase}: {needed / GIGABYTE:.1f} GB do not fit into the {room / GIGABYTE:.1f} GB "
                    f"that {gpu.name} has to give; {remedy(c, stage, phase, parts, room)}"
                )


def outside_the_language_model(models: dict[Any, Model]) -> Iterator[str]:
    """Adapters that are not on the language model alone."""
    for track, model in models.items():
        adapted, decoder = model.architecture.adapted(model.target_modules), model.architecture.decoder
        seen = sum(not name.startswith(f"{decoder}.") for name in adapted)
        if seen:
            yield (
                f"training.{track}.lora.target_modules matches {len(adapted)} layers, {seen} of them in the vision "
                f"tower; restrict it to the language model, {decoder}"
            )


def remedy(c: Configuration, stage: Stage, phase: str, parts: dict[str, float], room: float) -> str:
    """The key that makes a phase need less."""
    if parts.get("weights", 0) > room:
        return "the weights alone do not: set policy.hub.repository to a smaller model, or take a larger GPU"
    if phase == "rollouts":
        if c.rollouts.engine == "vllm":
            return "set policy.hub.repository to a smaller model, or take a larger GPU"
        return f"lower rollouts.batch_items ({c.rollouts.batch_items}), or policy.max_pixels"
    track = stage.name.split()[-1]
    t: Training = getattr(c.training, track)
    if "vLLM" in parts:
        return f"lower training.{track}.vllm.gpu_memory_utilization, or set training.{track}.generation to transformers"
    if phase == "update":
        if not t.gradient_checkpointing:
            return f"set training.{track}.gradient_checkpointing to true"
        if t.gradient_accumulation < t.prompts_per_step * t.group_size:
            return f"raise training.{track}.gradient_accumulation ({t.gradient_accumulation}): same but for rounding"
        return f"lower training.{track}.max_completion_tokens ({t.max_completion_tokens}) or policy.max_pixels"
    lower = f"lower training.{track}.prompts_per_step ({t.prompts_per_step})"
    if phase == "validation":
        return f"{lower}: half of a step is validated at once"
    return f"{lower}: TRL generates the {t.prompts_per_step * t.group_size} completions of a step at once"
