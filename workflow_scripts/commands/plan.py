"""Say what a configuration costs before it runs: downloads, disk, work, GPU memory and GPU-hours.

python -m workflow_scripts plan --configfile configs/paper.yaml
python -m workflow_scripts plan --configfile configs/paper-3b.yaml --gpu rtx4090 --config 'seeds=[0, 1, 2]'
python -m workflow_scripts plan --compare        # of the default, with what its run in results/ has recorded

It downloads and runs nothing. Formulas, what they were checked against and what is only assumed: docs/plan.md.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from tabulate import tabulate

from workflow_scripts.configuration.model import Configuration, ConfigurationError, Dataset, Track, Training, load
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.configuration.targets import measured, shards
from workflow_scripts.files.paths import ROOT
from workflow_scripts.planning import artifacts
from workflow_scripts.planning.architecture import BYTES, Architecture, PlanError
from workflow_scripts.planning.costs import (
    CPU,
    GIGABYTE,
    Assumptions,
    Cost,
    Gpu,
    Length,
    Model,
    rollout_cost,
    rollout_memory,
    training_costs,
    training_memory,
    vllm_cost,
)
from workflow_scripts.planning.workload import Questions, TextTokens, questions
from workflow_scripts.running.command_line import tell_briefly

FACTS: dict[str, Any] = yaml.safe_load((Path(__file__).parents[1] / "planning/facts.yaml").read_text(encoding="utf-8"))


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
    """All that is printed."""

    configuration: Configuration
    model: Model
    gpu: Gpu
    assumed: Assumptions
    stages: list[Stage]
    artifacts: list[artifacts.Artifact]
    warnings: list[str]


# ------------------------------------------------------------------------------------------------ the configuration


def merged(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """Mapping with an overlay's values, as Snakemake merges configuration files."""
    inner = {k: merged(base[k], v) for k, v in overlay.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | overlay | inner


def configured(files: list[Path], settings: list[str]) -> Configuration:
    """The default, overlays on it, and `key=value` settings like those of Snakemake's --config.

    Raises:
        ConfigurationError: a key or a value is wrong, or a setting is none.
    """
    raw = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    for path in files:
        raw = merged(raw, yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigurationError(f"--config {setting}: give key=value, such as 'seeds=[0, 1]'")
        raw = merged(raw, {key: yaml.safe_load(value)})
    return load(raw)


# ------------------------------------------------------------------------------------------------------- the policy


def model_folder(c: Configuration) -> Path | None:
    """Folder of the policy where it is on this machine already: bundled, given, or in the Hub's cache."""
    if c.policy.source != "hub":
        return ROOT / c.policy.bundled  # a cold start makes the same sizes
    if c.policy.hub.path:
        return Path(c.policy.hub.path)
    found = try_to_load_from_cache(c.policy.hub.repository, "config.json", revision=c.policy.hub.revision)
    return Path(found).parent if isinstance(found, str) else None


def read_architecture(c: Configuration, folder: Path | None) -> Architecture:
    """Sizes of the policy, from its config.json or from what is published of it.

    Raises:
        PlanError: it is neither here nor one of the published ones known here.
    """
    if folder is not None:
        return Architecture.of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if c.policy.hub.repository not in FACTS["models"]:
        raise PlanError(
            f"policy.hub.repository {c.policy.hub.repository} is neither on this machine nor known here; known are "
            f"{', '.join(FACTS['models'])}. Set policy.hub.path to a folder with its config.json and tokenizer"
        )
    return Architecture.of(FACTS["models"][c.policy.hub.repository])


def text_counter(c: Configuration, folder: Path | None) -> TextTokens:
    """Counts a question's tokens without visual ones: by its own processor where that is here, else as an estimate."""
    if folder is None:
        return estimated_tokens
    from transformers import AutoProcessor

    from workflow_scripts.policy.prompts import messages

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    image = processor.image_token

    def counted(template: str, prompt: str) -> float:
        text = processor.apply_chat_template(messages(template, prompt), add_generation_prompt=True, tokenize=False)
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return float(len(ids) - text.count(image))

    return counted


def estimated_tokens(template: str, prompt: str) -> float:
    """Tokens of a question for Qwen's vocabulary, from its characters."""
    chat, images = FACTS["chat"], template.count("{image}")
    characters = len(template) - len("{image}") * images - len("{prompt}") + len(prompt)
    return float(chat["tokens"] + chat["image_marks"] * images + characters / chat["characters_per_token"])


def completion_length(c: Configuration, assumed: Assumptions, track: Track, budget: int) -> Length:
    """Mean and longest completion: measured of the bundled policy, else a share of the budget, and all of it."""
    if c.policy.source == "hub":
        return Length(assumed.completion_share * budget, budget)
    known = FACTS["bundled_completions"][ModelConfig.of(c, track).protocol]
    return Length(min(known["mean"], budget), min(known["longest"], budget))


def data_sheet(name: str) -> Gpu:
    """A GPU as its vendor states it."""
    stated = FACTS["gpus"][name]
    return Gpu(name, stated["teraflops"] * 1e12, stated["memory"] * GIGABYTE, stated["bandwidth"] * 1e9)


def this_cpu(threads: int) -> Gpu:
    """This machine's CPU, measured in its own time: float32 products of 512 x 512, and reading memory."""
    import psutil
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    block = torch.randn(2**24)
    rates = {}
    for name, run, work in (("flops", lambda: a @ b, 2 * 512**3), ("bandwidth", block.sum, 4 * 2**24)):
        run()
        started = time.process_time()  # of all threads; what other processes do meanwhile is left out
        for _ in range(20):
            run()
        rates[name] = work * 20 * threads / (time.process_time() - started)
    return Gpu(CPU, rates["flops"], psutil.virtual_memory().total, rates["bandwidth"])


# --------------------------------------------------------------------------------------------------------- the plan


def plan(c: Configuration, gpu: Gpu, assumed: Assumptions) -> Plan:
    """What the configuration costs on that GPU.

    Raises:
        PlanError: the policy is not known, or data are not here.
    """
    folder = model_folder(c)
    architecture, tokens = read_architecture(c, folder), text_counter(c, folder)
    found: dict[Any, Questions] = {}

    def asked(track: Track, dataset: Dataset, split: Any) -> Questions:
        key = (track, dataset, split)
        if key not in found:
            found[key] = questions(c, FACTS, architecture, tokens, track, dataset, split)
        return found[key]

    models, stages = {}, []
    for track in c.tracks:
        t: Training = getattr(c.training, track)
        model = Model(architecture, c.policy.dtype, c.policy.attention, t.lora.rank, t.lora.target_modules)
        models[track] = model
        train, validation = asked(track, track, "train"), asked(track, track, "validation")
        length = completion_length(c, assumed, track, t.max_completion_tokens)
        whole = Length(t.max_completion_tokens, t.max_completion_tokens)
        costs, highest = (
            training_costs(model, gpu, assumed, t, c.distributed, train, validation, n) for n in (length, whole)
        )
        completions = t.steps * t.prompts_per_step * t.group_size / t.num_iterations
        stages.append(
            Stage(
                name=f"train_grpo {track}",
                jobs=len(c.seeds),
                asked=train,
                rollouts=completions,
                prompt_tokens=completions * train.mean,
                completion_tokens=completions * length.mean,
                at_most=completions * t.max_completion_tokens,
                memory=training_memory(model, gpu, t, c.distributed, train, validation),
                costs=costs,
                highest=sum(highest.values(), Cost(0, 0)),
            )
        )
    r = c.rollouts
    for track, policy, test in dict.fromkeys(case[:3] for case in measured(c)):
        model, tested = models[track], asked(track, test, "test")
        budget = r.sampling.max_thinking_tokens + r.sampling.max_answer_tokens
        length = completion_length(c, assumed, track, budget)
        cost, most = (
            rollouts_of(c, model, gpu, assumed, tested, n, policy == "grpo") for n in (length, Length(*[budget] * 2))
        )
        rollouts = tested.items * r.block_size * r.blocks
        stages.append(
            Stage(
                name=f"generate_rollouts {track} {policy} on {test}",
                jobs=len(shards(c, test)) * r.blocks * len(c.seeds),
                asked=tested,
                rollouts=rollouts,
                prompt_tokens=tested.tokens * r.blocks,
                completion_tokens=rollouts * length.mean,
                at_most=rollouts * budget,
                memory={"rollouts": rollout_memory(model, gpu, r, tested, policy == "grpo")},
                costs={"rollouts": cost},
                highest=most,
            )
        )
    made = artifacts.artifacts(c, models, {stage.name: stage.completion_tokens for stage in stages})
    told = [*misfits(c, stages, gpu, assumed), *wrong_layers(models)]
    return Plan(c, models[c.tracks[0]], gpu, assumed, stages, made, told)


def rollouts_of(
    c: Configuration, m: Model, gpu: Gpu, assumed: Assumptions, asked: Questions, length: Length, trained: bool
) -> Cost:
    """Cost of all rollouts of a policy on a test set for one seed."""
    r = c.rollouts
    if r.engine == "vllm":
        cache = r.vllm.gpu_memory_utilization * gpu.memory - m.architecture.parameters() * BYTES[m.dtype]
        each = vllm_cost(m, gpu, assumed, asked, asked.items, r.block_size, length, cache, trained)
    else:
        beside = trained and m.dtype != "float32"
        each = rollout_cost(m, gpu, assumed, asked, r.batch_items, r.block_size, length, beside)
    return each.times(r.blocks)


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


def wrong_layers(models: dict[Any, Model]) -> Iterator[str]:
    """Adapters that are not on the language model, or not on it alone."""
    for track, model in models.items():
        adapted = model.architecture.adapted(model.target_modules)
        seen = sum(".visual." in linear.name for linear in adapted)
        if seen or not adapted:
            yield (
                f"training.{track}.lora.target_modules matches {len(adapted)} layers, {seen} of them in the vision "
                f"tower; the default matches {7 * model.architecture.layers} of the language model"
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
    if phase == "validation":
        return f"lower training.{track}.prompts_per_step ({t.prompts_per_step}): half of a step is validated at once"
    return (
        f"lower training.{track}.prompts_per_step ({t.prompts_per_step}): TRL generates the "
        f"{t.prompts_per_step * t.group_size} completions of a step at once"
    )


# ---------------------------------------------------------------------------------------------------------- the report


def rounded(value: float) -> str:
    """Three digits with a unit: 1,234,567 -> 1.23 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def report(p: Plan) -> str:
    """The plan for people."""
    a, c = p.model.architecture, p.configuration
    room = p.gpu.memory * (1 - p.assumed.memory_reserved)
    source = c.policy.hub.repository if c.policy.source == "hub" else c.policy.bundled
    lines = [
        f"Policy {source}: {a.parameters():,} parameters in {p.model.dtype}, attention {p.model.attention}; LoRA of "
        f"rank {p.model.rank} on {len(a.adapted(p.model.target_modules))} layers, {p.model.adapter:,} parameters.",
        f"GPU {p.gpu.name}: {p.gpu.flops / 1e12:.4g} TFLOP/s, {p.gpu.memory / GIGABYTE:.4g} GB, "
        f"{p.gpu.bandwidth / 1e9:.4g} GB/s.",
        "Assumed: " + ", ".join(f"{f.name} {getattr(p.assumed, f.name):g}" for f in fields(p.assumed)) + ".",
    ]
    disk = [
        [x.name, x.where, f"{x.download / 1e9:.2f}", f"{x.disk / 1e9:.2f}", "" if x.lasting else "while training"]
        for x in p.artifacts
    ]
    total = ["sum", "", *(f"{sum(getattr(x, k) for x in p.artifacts) / 1e9:.2f}" for k in ("download", "disk")), ""]
    free = shutil.disk_usage(ROOT).free / 1e9
    lines += _section(
        f"Downloads and disk, GB ({free:.0f} free here)", ["what", "where", "download", "disk", ""], [*disk, total]
    )
    work = [
        [
            s.name,
            s.jobs,
            _count(s.asked.prompts, s),
            _count(s.asked.items, s),
            f"{s.rollouts:,.0f}",
            f"{s.asked.mean:,.0f}",
            rounded(s.prompt_tokens),
            rounded(s.completion_tokens),
            rounded(s.at_most),
            f"{sum(x.flops for x in s.costs.values()) / 1e15:.3g}",
        ]
        for s in p.stages
    ]
    header = [
        "stage",
        "jobs",
        "prompts",
        "items",
        "rollouts",
        "tokens/item",
        "prompt tokens",
        "completions",
        "at most",
        "PFLOP",
    ]
    lines += _section(
        f"Work for one seed of {len(c.seeds)} (~: expected from published totals, else counted)", header, work
    )
    parts = ["weights", "adapter", "optimizer", "kv cache", "activations", "pixels", "workspace", "vLLM"]
    memory = [
        [
            s.name,
            phase,
            *(f"{m.get(x, 0) / GIGABYTE:.2f}" for x in parts),
            f"{sum(m.values()) / GIGABYTE:.2f}",
            "fits" if sum(m.values()) <= room else "DOES NOT FIT",
        ]
        for s in p.stages
        for phase, m in s.memory.items()
    ]
    lines += _section(
        f"GPU memory at its peak, GB of {room / GIGABYTE:.1f}", ["stage", "phase", *parts, "sum", ""], memory
    )
    hours = [
        [
            s.name,
            ", ".join(f"{k} {x.seconds / 3600:.2g}" for k, x in s.costs.items()),
            f"{sum(x.seconds for x in s.costs.values()) / 3600:.3g}",
            f"{s.highest.seconds / 3600:.3g}",
        ]
        for s in p.stages
    ]
    both = [sum(x.seconds for s in p.stages for x in s.costs.values()), sum(s.highest.seconds for s in p.stages)]
    hours.append([f"sum x {len(c.seeds)} seeds", "", *(f"{len(c.seeds) * x / 3600:.3g}" for x in both)])
    title = "GPU-hours"
    if (processes := c.distributed.processes) > 1:
        title += f" (a training runs on {processes} GPUs at once: it takes 1/{processes} of its GPU-hours)"
    lines += _section(title, ["stage", "of which", "expected", "at most"], hours)
    lines += ["", *(f"WARNING: {text}" for text in p.warnings)]
    return "\n".join(lines).rstrip()


def _count(number: float, stage: Stage) -> str:
    return f"{number:,.0f}" if stage.asked.counted else f"~{number:,.0f}"


def _section(title: str, header: list[str], rows: list[list[Any]]) -> list[str]:
    return [
        "",
        title,
        tabulate(rows, header, disable_numparse=True, colalign=("left",) + ("right",) * (len(header) - 1)),
    ]


def as_json(p: Plan) -> str:
    """The plan for programs: bytes, FLOPs and seconds."""
    value = asdict(p) | {"configuration": p.configuration.model_dump(mode="json")}
    value["model"]["parameters"], value["model"]["adapter"] = p.model.architecture.parameters(), p.model.adapter
    return json.dumps(value, indent=2)


def recorded_stages(c: Configuration) -> Iterator[tuple[str, dict[str, float]]]:
    """Stages that a run has recorded, by their names in the plan: items, rollouts, seconds of the first seed."""
    import pyarrow.parquet as pq

    seed = c.seeds[0]
    for track in c.tracks:
        adapter = Path(c.results) / f"policies/{track}/seed{seed}/adapter_model.safetensors"
        sidecar = _sidecar(adapter)
        history = json.loads(adapter.with_name("training.json").read_text())["history"]
        trained = [entry for entry in history if "num_tokens" in entry]
        yield (
            f"train_grpo {track}",
            {
                "items": sidecar["metrics"]["training_items"],
                "tokens": trained[-1]["num_tokens"],
                "seconds": sidecar["seconds"],
                "CPU seconds": _cpu_seconds(c, f"train_grpo/{track}-seed{seed}.tsv"),
            },
        )
    for track, policy, test in dict.fromkeys(case[:3] for case in measured(c)):
        paths = sorted((Path(c.results) / f"rollouts/{track}/{policy}/seed{seed}/{test}").glob("*.parquet"))
        if not paths:
            continue
        sidecars = [_sidecar(path) for path in paths]
        ids = [len(row) for path in paths for row in pq.read_table(path)["completion_ids"].to_pylist()]
        yield (
            f"generate_rollouts {track} {policy} on {test}",
            {
                "items": sum(s["metrics"]["items"] for s in sidecars) / c.rollouts.blocks,
                "rollouts": sum(s["metrics"]["rollouts"] for s in sidecars),
                "completion tokens": sum(ids),
                "seconds": sum(sidecar["seconds"] for sidecar in sidecars),
                "CPU seconds": _cpu_seconds(c, f"generate_rollouts/{track}-{policy}-seed{seed}-{test}-*.tsv"),
            },
        )


def _sidecar(output: Path) -> dict[str, Any]:
    path = output.with_name(output.name + ".provenance.json")
    if not path.is_file():
        raise PlanError(f"{path} is not there: nothing to compare with; run snakemake with this configuration first")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _cpu_seconds(c: Configuration, pattern: str) -> float:
    """Time on the CPU of some jobs, from Snakemake's benchmarks: the same whatever else the machine does."""
    paths = (Path(c.results) / "benchmarks").glob(pattern)
    return sum(float(path.read_text().splitlines()[1].split("\t")[-1]) for path in paths)


def comparison(p: Plan) -> str:
    """Planned and recorded numbers side by side."""
    planned = {stage.name: stage for stage in p.stages}
    rows = []
    for name, recorded in recorded_stages(p.configuration):
        stage = planned[name]
        numbers = {
            "items": stage.asked.items,
            "rollouts": stage.rollouts,
            "tokens": stage.prompt_tokens + stage.completion_tokens,
            "completion tokens": stage.completion_tokens,
            "seconds": sum(cost.seconds for cost in stage.costs.values()),
        }
        numbers["CPU seconds"] = numbers["seconds"]
        for key, value in recorded.items():
            rows.append([name, key, f"{numbers[key]:,.0f}", f"{value:,.0f}", f"{numbers[key] / value:.2f}"])
    return "\n".join(_section("Planned and recorded", ["stage", "what", "planned", "recorded", "ratio"], rows)).lstrip()


def main() -> None:
    """Run the command."""
    sys.excepthook = tell_briefly
    parser = argparse.ArgumentParser(
        prog="python -m workflow_scripts plan", description="Say what a configuration costs before it runs."
    )
    parser.add_argument("--configfile", nargs="+", type=Path, default=[], help="overlays on config.yaml, in order")
    parser.add_argument("--config", nargs="+", default=[], help="key=value settings, as of snakemake")
    parser.add_argument("--gpu", choices=[*FACTS["gpus"], CPU], help="default: h100-80gb, or cpu for device: cpu")
    for field in fields(Assumptions):
        parser.add_argument(f"--{field.name}", type=float, default=field.default, help=f"default: {field.default}")
    parser.add_argument("--format", choices=["table", "json"], default="table", help="default: table")
    parser.add_argument("--compare", action="store_true", help="with what a run of this configuration has recorded")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where something does not fit")
    arguments = parser.parse_args()
    try:
        c = configured(arguments.configfile, arguments.config)
        name = arguments.gpu or ("h100-80gb" if c.policy.device == "cuda" else CPU)
        gpu = this_cpu(c.numeric_threads) if name == CPU else data_sheet(name)
        assumed = Assumptions(**{field.name: getattr(arguments, field.name) for field in fields(Assumptions)})
        planned = plan(c, gpu, assumed)
        if arguments.compare:
            print(comparison(planned))
        else:
            print(as_json(planned) if arguments.format == "json" else report(planned))
    except (ConfigurationError, PlanError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if arguments.strict and planned.warnings:
        sys.exit(1)


if __name__ == "__main__":
    main()
