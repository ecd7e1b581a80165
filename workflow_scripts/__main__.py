"""The commands that people type: `python -m workflow_scripts --help`."""

import sys

from pydantic import Field
from pydantic_settings import BaseSettings, CliApp, CliSubCommand, SettingsConfigDict

from workflow_scripts.commands.check_gpu import CheckGpu
from workflow_scripts.commands.log_runs import LogRuns
from workflow_scripts.commands.plan import Plan
from workflow_scripts.commands.rank import Rank
from workflow_scripts.commands.register import Register
from workflow_scripts.commands.reproduce import Reproduce
from workflow_scripts.commands.summary import Summary
from workflow_scripts.commands.verify import Verify
from workflow_scripts.running.command_line import UsageError, parse, tell_briefly


class Commands(BaseSettings):
    """The commands of softpref."""

    model_config = SettingsConfigDict(
        use_attribute_docstrings=True, cli_implicit_flags="toggle", cli_hide_none_type=True, cli_avoid_json=True
    )

    rank: CliSubCommand[Rank]
    """Rank your own images for a prompt by a trained policy."""
    plan: CliSubCommand[Plan]
    """Say what a configuration costs before it runs."""
    check_gpu: CliSubCommand[CheckGpu] = Field(alias="check-gpu")
    """Measure one real step of each phase before the run that costs money."""
    verify: CliSubCommand[Verify]
    """Check every file of a results folder against its provenance."""
    reproduce: CliSubCommand[Reproduce]
    """Say cell by cell whether results have the digits of the published tables."""
    summary: CliSubCommand[Summary]
    """Say what a results folder holds."""
    log_runs: CliSubCommand[LogRuns] = Field(alias="log-runs")
    """Log results to MLflow that its store does not have."""
    register_policies: CliSubCommand[Register] = Field(alias="register")
    """Register trained policies as models in MLflow."""


def main(words: list[str] | None = None) -> None:
    """Run a command; `words` are those of the command line by default.

    Exit status: 0 done; 1 an error, said in one line; 2 wrong arguments.
    """
    words = (sys.argv[1:] if words is None else words) or ["--help"]
    about = "Commands beside the workflow. `COMMAND --help` says more about each; the workflow itself is `snakemake`."
    chosen = parse(Commands, words, prog="python -m workflow_scripts", about=about)
    try:
        CliApp.run_subcommand(chosen)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    from workflow_scripts.running.redacted_output import redact_output

    sys.excepthook = tell_briefly
    redact_output()
    main()
