"""`check-gpu`: measure one real step of each phase before the run that costs money."""

import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode

from workflow_scripts.commands.plan import split_settings
from workflow_scripts.configuration.jobs import interpreter
from workflow_scripts.configuration.model import Configuration
from workflow_scripts.planning.devices import Assumptions
from workflow_scripts.running.arithmetic import pinned
from workflow_scripts.running.command_line import Command


class CheckGpu(Command, Assumptions):
    """Measure one training step, validation batch and rollout batch of each track, and extrapolate the hours.

    Downloads nothing: a policy from the Hub gets random weights of its size. First checks driver, CUDA, GPU and disk.
    Where vLLM generates, the interpreter in vllm_python measures.

    example: python -m workflow_scripts check-gpu --configfile configs/paper.yaml
    """

    configfile: list[Path] = Field([])
    """Overlay on config.yaml; repeat the option for several, in order."""
    config: Annotated[list[str], NoDecode, BeforeValidator(split_settings)] = Field([])
    """Change `key=value`, as of snakemake; repeat the option for several."""
    output: Path | None = None
    """Where the report is written, as .md and .json; `check-gpu` in the results folder by default."""

    def cli_cmd(self) -> None:
        """Check, measure, write and print the report; exit with 1 where something does not fit."""
        from workflow_scripts.configuration.overlays import parse_changes, read_configuration
        from workflow_scripts.configuration.stages import RUN_MODELS
        from workflow_scripts.preflight.machine import check_run

        c = read_configuration(self.configfile, parse_changes(self.config))
        _run_where_jobs_do(c)
        gpus = check_run(c, RUN_MODELS)
        if c.policy.device == "cpu":
            os.environ.update(pinned(c.numeric_instructions))
        import workflow_scripts.training.assembly  # noqa: F401  # what a training imports, for its start

        start = time.process_time() if c.policy.device == "cpu" else _seconds_of_this_process()
        from workflow_scripts.files.writing import replacing, write_json
        from workflow_scripts.preflight.report import as_json, markdown
        from workflow_scripts.preflight.run import check

        assumed = Assumptions(**{key: getattr(self, key) for key in Assumptions.model_fields})
        output = self.output or Path(c.results) / "check-gpu"
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:  # there a run has room for weights
            report = check(c, assumed, gpus, start, Path(folder))
        text = markdown(report)
        with replacing(output.with_suffix(".md")) as temporary:
            temporary.write_text(text, encoding="utf-8")
        write_json(output.with_suffix(".json"), as_json(report))
        print(text)
        sys.exit(int(bool(report.misfits)))


def _run_where_jobs_do(c: Configuration) -> None:
    """Start this command again in vLLM's environment, if the trainings and rollouts run there and it is there."""
    (python,) = shlex.split(interpreter(c, "train_grpo"))
    if python != "python" and importlib.util.find_spec("vllm") is None and os.access(python, os.X_OK):
        if Path(python).parent.samefile(Path(sys.executable).parent):
            return
        sys.exit(subprocess.run([python, "-m", "workflow_scripts", *sys.argv[1:]], check=False).returncode)


def _seconds_of_this_process() -> float:
    import psutil

    return time.time() - psutil.Process().create_time()
