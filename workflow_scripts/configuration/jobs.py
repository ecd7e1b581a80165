"""How the job of a rule starts: resources, GPUs, interpreter and launcher."""

import shlex
from collections.abc import Collection
from pathlib import Path

from workflow_scripts.configuration.model import Configuration, ConfigurationError
from workflow_scripts.configuration.published import published_files
from workflow_scripts.files.paths import ROOT


def job_resources(c: Configuration, rule: str) -> dict[str, int]:
    """Resources that Snakemake and a cluster reserve for a job: GPUs, `mem_mb` and `runtime` in minutes."""
    asked = getattr(c.resources, rule, c.resources.others)
    return {"gpu": gpus(c, rule), "mem_mb": round(1000 * asked.memory_gigabytes), "runtime": asked.minutes}


def gpus(c: Configuration, rule: str) -> int:
    """Number of GPUs that a job of a rule uses."""
    shared = c.rollouts.vllm.tensor_parallel_size if c.rollouts.engine == "vllm" else 1
    used = {"train_grpo": c.distributed.processes, "generate_rollouts": shared, "rank_own_images": 1}
    return used.get(rule, 0) * (c.policy.device == "cuda")


def in_vllm(c: Configuration, rule: str) -> bool:
    """Whether the stage of a rule runs in vLLM's environment.

    Where vLLM generates anything, all trainings and rollouts do, so that those of one run have the same versions of
    torch and transformers.
    """
    trained = c.tracks if c.trains() else []
    engines = [c.rollouts.engine, *(getattr(c.training, track).generation for track in trained)]
    return rule in ("generate_rollouts", "train_grpo") and any(engine.startswith("vllm") for engine in engines)


def interpreter(c: Configuration, rule: str) -> str:
    """Python that runs the stage of a rule, quoted for the shell."""
    return shlex.quote(str(ROOT / c.vllm_python)) if in_vllm(c, rule) else "python"


def pins_instructions(c: Configuration, rule: str) -> bool:
    """Whether `numeric_instructions` are those of a rule's job: not of models on CUDA, nor of vLLM."""
    by_vllm = rule == "generate_rollouts" and c.rollouts.engine == "vllm"
    return not (by_vllm or gpus(c, rule))


def check_interpreters(c: Configuration, rules: Collection[str]) -> None:
    """Check that the environments of jobs of these rules are there.

    Raises:
        ConfigurationError: vLLM's is not.
    """
    python = ROOT / c.vllm_python
    if any(in_vllm(c, rule) for rule in rules) and not python.is_file():
        target = "vllm-gpu" if c.policy.device == "cuda" else "vllm-cpu"
        raise ConfigurationError(
            f"vLLM generates in this run, but vllm_python, {python}, is missing; make it with make {target}, or set "
            "rollouts.engine and training.*.generation to transformers"
        )


def launcher(c: Configuration, rule: str) -> str:
    """Command that starts the stage of a rule: the interpreter, on GPUs of its own, in the configured processes."""
    processes = c.distributed.processes if rule == "train_grpo" else 1
    several = f" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node {processes}"
    taken = f"python -m workflow_scripts.running.take_gpus {_needed(c, rule)}{gpus(c, rule)} " if gpus(c, rule) else ""
    return taken + interpreter(c, rule) + (several if processes > 1 else "")


def _needed(c: Configuration, rule: str) -> str:
    """Options of take_gpus: what each GPU of a job must be able to do."""
    gigabytes = memory_on_each_gpu(c, rule) / 1e9
    return "--bfloat16 " * (c.policy.dtype == "bfloat16") + (f"--gigabytes {gigabytes:.2f} " if gigabytes else "")


def memory_on_each_gpu(c: Configuration, rule: str) -> float:
    """Bytes of the weights that a job has on each of its GPUs, as they are stored; 0 where they are not known yet."""
    divided = rule == "generate_rollouts" or c.distributed.strategy == "fsdp"
    return weights_bytes(c) / (max(1, gpus(c, rule)) if divided else 1)


def weights_bytes(c: Configuration) -> float:
    """Bytes of the policy's weights as they are published or lie in `policy.hub.path`; 0 where they are not known."""
    if c.policy.source != "hub":
        return 0
    if c.policy.hub.path:
        return sum(path.stat().st_size for path in Path(c.policy.hub.path).glob("*.safetensors"))
    files = published_files(c.policy.hub.repository)
    return sum(file["bytes"] for name, file in files.items() if name.endswith(".safetensors"))
