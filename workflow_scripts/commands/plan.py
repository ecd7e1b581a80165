"""`plan`: say what a configuration costs before it runs."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode

from workflow_scripts.planning.devices import CPU, FACTS, Assumptions, data_sheet, this_cpu
from workflow_scripts.running.command_line import Command, UsageError


def split_settings(joined: Any) -> Any:
    """Undo that pydantic-settings joins repeated options by commas, some of which belong to a YAML value."""
    import yaml

    if not isinstance(joined, str):
        return joined
    settings: list[str] = []
    for piece in re.split(r",(?=[A-Za-z_][\w-]*=)", joined):
        try:
            yaml.safe_load(settings[-1].partition("=")[2] if settings else "")
            settings.append(piece)
        except yaml.YAMLError:  # the one before ends within brackets or quotes
            settings[-1] += f",{piece}"
    return settings


class Plan(Command, Assumptions):
    """Say what a configuration costs before it runs: downloads, disk, work, GPU memory and GPU-hours.

    Downloads and runs nothing. Formulas, what they were checked against and what is only assumed: docs/plan.md.

    example: python -m workflow_scripts plan --configfile configs/paper-3b.yaml --gpu rtx4090 --config 'seeds=[0, 1]'
    """

    configfile: list[Path] = Field([])
    """Overlay on config.yaml; repeat the option for several, in order."""
    config: Annotated[list[str], NoDecode, BeforeValidator(split_settings)] = Field([])
    """Change `key=value`, as of snakemake; repeat the option for several."""
    gpu: str = ""
    """GPU, such as h100-80gb (the default for device: cuda), or cpu (the default for device: cpu): this machine's."""
    format: Literal["table", "json"] = "table"
    """What is printed."""
    compare: bool = False
    """Print the plan beside what a run of this configuration has recorded."""
    strict: bool = False
    """Exit with 1 where something does not fit."""

    def cli_cmd(self) -> None:
        """Print the plan."""
        from workflow_scripts.configuration.overlays import parse_changes, read_configuration

        c = read_configuration(self.configfile, parse_changes(self.config))  # first: torch takes seconds to import
        name = self.gpu or ("h100-80gb" if c.policy.device == "cuda" else CPU)
        if name not in (known := [*FACTS["gpus"], CPU]):
            raise UsageError(f"--gpu {name} is not known; known are {', '.join(known)}")
        from workflow_scripts.planning.comparison import comparison
        from workflow_scripts.planning.plan import plan
        from workflow_scripts.planning.report import as_json, report

        gpu = this_cpu(c.numeric_threads) if name == CPU else data_sheet(name)
        assumed = Assumptions(**{key: getattr(self, key) for key in Assumptions.model_fields})
        planned = plan(c, gpu, assumed)
        formats = {"table": report, "json": as_json}
        print(comparison(planned) if self.compare else formats[self.format](planned))
        sys.exit(int(self.strict and bool(planned.warnings)))
