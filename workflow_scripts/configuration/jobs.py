"""How the job of a rule starts: resources, GPUs, interpreter and launcher."""

import shlex

from workflow_scripts.configuration.model import Configuration
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


def interpreter(c: Configuration, rule: str) -> str:
    """Python that runs the stage of a rule, quoted for the shell.

    Where vLLM generates anything, all trainings and rollouts run in its environment, so that those of one run have the
    same versions of torch and transformers.
    """
    engines = [c.rollouts.engine, *(getattr(c.training, track).generation for track in c.tracks)]
    in_vllm = rule in ("generate_rollouts", "train_grpo") and any(engine.startswith("vllm") for engine in engines)
    return shlex.quote(str(ROOT / c.vllm_python)) if in_vllm else "python"


def launcher(c: Configuration, rule: str) -> str:
    """Command that starts the stage of a rule: the interpreter, on GPUs of its own, in the configured processes."""
    processes = c.distributed.processes if rule == "train_grpo" else 1
    several = f" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node {processes}"
    taken = f"python -m workflow_scripts.running.take_gpus {gpus(c, rule)} " if gpus(c, rule) else ""
    return taken + interpreter(c, rule) + (several if processes > 1 else "")
