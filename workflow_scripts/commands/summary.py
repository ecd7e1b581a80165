"""`summary`: say what a results folder holds. The workflow says the same at its end, and where it fails why."""

import csv
import os
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from workflow_scripts.commands import reproduce
from workflow_scripts.configuration.model import Configuration, Tracking
from workflow_scripts.files.redaction import redacted
from workflow_scripts.reporting.wording import HEADS, number, table_titles, with_interval
from workflow_scripts.running.command_line import Command
from workflow_scripts.running.provenance import read_sidecar, sidecars

ERROR_LINE = re.compile(r"^(error: |wrong arguments|[\w.]*(Error|Exception|Interrupt)\b)")
# Without the end of this address a new browser shows MLflow's menu for generative AI, without runs.
RUNS_PAGE = "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"


class Summary(Command):
    """Say what a results folder holds: what was made, both tables, warnings, and where to look next.

    example: python -m workflow_scripts summary --results results/three-seeds --uri http://127.0.0.1:5000
    """

    results: Path = Path("results")
    """Results folder."""
    uri: str = os.environ.get("MLFLOW_TRACKING_URI") or Tracking.model_fields["uri"].default
    """Tracking store; MLFLOW_TRACKING_URI sets the default."""

    def cli_cmd(self) -> None:
        """Print the summary."""
        if not self.results.is_dir() or not sidecars(self.results):
            sys.exit(f"error: {self.results} holds no results; name a results folder, or run snakemake first")
        summarise(self.results, None, self.uri, console(sys.stdout))


def console(stream: TextIO) -> Console:
    """Where to print: as wide as the terminal; plain text of any width where it is none."""
    terminal = stream.isatty()
    return Console(file=stream, highlight=False, width=None if terminal else 140, no_color=not terminal)


def summarise(
    results: Path, downloads: Path | None, uri: str, screen: Console, since: float = 0.0, reproduced: str = ""
) -> None:
    """Print the summary of a results folder; nothing where no job has begun since then (seconds since 1970).

    `reproduced` says whether the tables are the published ones.
    """
    folders = [results, *([downloads] if downloads and not downloads.is_relative_to(results) else [])]
    paths = [path for folder in folders if folder.is_dir() for path in sidecars(folder)]
    found = [read_sidecar(path.with_name(path.name.removesuffix(".provenance.json"))) for path in paths]
    made = [record for record in found if datetime.fromisoformat(record["started"]).timestamp() >= since]
    if not made:
        return
    screen.print(stages_table(made, screen))
    for name, title in table_titles(any(record["stage"] == "train_grpo" for record in found)).items():
        if (results / f"{name}.csv").is_file():
            screen.print(accuracy_table(results / f"{name}.csv", name, title, screen))
    if reproduced:
        screen.print(f"Tables: {reproduced}", markup=False, soft_wrap=True)
    warnings = sorted({warning for record in made for warning in record["warnings"]})
    for warning in warnings[:5]:
        screen.print(f"warning: {warning}", style="yellow", markup=False)
    if len(warnings) > 5:
        screen.print(f"and {len(warnings) - 5} more warnings, in {results}/logs", style="yellow", markup=False)
    screen.print("Where to look next:", style="bold")
    for name, what in {"tables.md": "both tables and all comparisons", "report.html": "figures and gallery"}.items():
        if (results / name).is_file():
            screen.print(f"  {results / name}: {what}", markup=False, soft_wrap=True)
    screen.print(f"  {look_at_runs(uri)}", markup=False, soft_wrap=True)


def look_at_runs(uri: str) -> str:
    """How to open the tracking store."""
    if not uri:
        return "runs were not tracked (tracking.enabled)"
    if uri.startswith(("http://", "https://")):
        return f"{redacted(uri)}: every job as a run, traces of the reasoning"
    command = ["mlflow", "ui", "--host", "127.0.0.1", "--backend-store-uri", redacted(uri)]
    return f"{shlex.join(command)}: every job as a run, traces of the reasoning, at {RUNS_PAGE}"


def stages_table(made: list[dict[str, Any]], screen: Console) -> Table:
    """Jobs and seconds of each stage, in the order in which they began."""
    by_stage = defaultdict(list)
    for record in sorted(made, key=lambda record: record["started"]):
        by_stage[record["stage"]].append(record)
    table = empty_table("What was made", screen)
    for name in ("stage", "jobs", "seconds", "peak MB"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, records in by_stage.items():
        seconds = sum(record["seconds"] for record in records)
        memory = max(record["peak_memory_megabytes"] for record in records)
        table.add_row(stage, str(len(records)), f"{seconds:.0f}", str(memory))
    return table


def accuracy_table(path: Path, name: str, title: str, screen: Console) -> Table:
    """One of the paper's tables from its CSV file: accuracies in % with their intervals."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = rows[0] if rows else {}
    means = [column for column in columns if re.fullmatch(r"mean@\d+", column)]
    papers = [column for column in columns if column.endswith("paper")]
    heads = [*HEADS[name], "seed"]
    shown = [column for column in [*heads, *papers, "ceiling"] if column in columns]
    table = empty_table(f"{title} (%)", screen)
    for column in [*shown, *means]:
        table.add_column(column, justify="left" if column in heads else "right", no_wrap=column in means)
    for row in rows:
        cells = [row[column] if column in heads else number(row[column]) for column in shown]
        table.add_row(*cells, *(with_interval(row, mean) for mean in means))
    return table


def empty_table(title: str, screen: Console) -> Table:
    """A table without rows: drawn with lines on a terminal, else with plain characters."""
    style = box.SIMPLE_HEAD if screen.is_terminal else box.ASCII
    return Table(title=title, title_justify="left", title_style="bold", box=style)


def last_error(log: Path) -> str:
    """The last line of a job's log that says an error, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    return (errors or lines or [""])[-1]


def failures(snakemake_log: str) -> list[tuple[str, Path | None]]:
    """Rule and log file of every job that Snakemake's own log says has failed."""
    found: dict[str, tuple[str, Path | None]] = {}
    for block in re.split(r"^(?=\[\w{3} \w{3}|Error in rule )", snakemake_log, flags=re.M):
        if rule := re.search(r"^Error in rule (\w+):", block, flags=re.M):
            log = re.search(r"^ +log: (.+?)(?: \(check log file.*)?$", block, flags=re.M)
            found[log[1] if log else rule[1]] = (rule[1], Path(log[1]) if log else None)
    return list(found.values())


def tell_success(configuration: Configuration, since: float) -> None:
    """Say at the end of a workflow what it made since then; whatever goes wrong with that is only said."""
    tracking = configuration.tracking
    uri = (os.environ.get("MLFLOW_TRACKING_URI") or tracking.uri) if tracking.enabled else ""
    try:
        results, downloads = Path(configuration.results), Path(configuration.downloads)
        summarise(results, downloads, uri, console(sys.stderr), since, reproduce.one_line(configuration))
    except Exception as error:  # the results are there, whatever can be said of them
        print(f"no summary: {type(error).__name__}: {redacted(str(error))}", file=sys.stderr)


def tell_failure(logs: Iterable[str]) -> None:
    """Say at the end of a workflow that failed which jobs did and why; whatever goes wrong with that is only said.

    `logs` are Snakemake's own.
    """
    try:
        screen = console(sys.stderr)
        text = "\n".join(Path(path).read_text(encoding="utf-8", errors="replace") for path in logs)
        for rule, log in failures(text):
            screen.print(f"failed: {rule}", style="bold red", markup=False)
            if log and log.is_file():
                screen.print(f"  {redacted(last_error(log))}", markup=False, soft_wrap=True)
                screen.print(f"  all it said: {log}", markup=False, soft_wrap=True)
        command = shlex.join(["snakemake", *sys.argv[1:]])
        screen.print("What is finished is kept. When the cause is gone, go on with:", markup=False)
        screen.print(f"  {redacted(command)}", markup=False, soft_wrap=True)
    except Exception as error:
        print(f"no summary: {type(error).__name__}: {redacted(str(error))}", file=sys.stderr)
