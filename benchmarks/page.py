"""Write the headline tables of docs/performance.md from results/*.csv, and the plot.

python -m benchmarks.page

The text between `<!-- name -->` and `<!-- end -->` is generated; the rest of the page is written by hand.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.measuring import RESULTS, machine
from workflow_scripts.files.paths import ROOT

PAGE = ROOT / "docs/performance.md"
PLOT = ROOT / "docs/images/performance.png"
PART = re.compile(r"<!-- ([a-z_]+) -->\n.*?<!-- end -->", re.DOTALL)


def speedups(contestant: str, index: list[str], column: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Return a function that selects one contestant and tabulates its speedup in CPU time."""

    def table(rows: pd.DataFrame) -> pd.DataFrame:
        chosen = rows[rows.contestant == contestant]
        wide = chosen.pivot(index=index, columns=column, values="speedup_cpu").reset_index()
        return wide.rename(columns={value: f"{column} = {value}" for value in chosen[column].unique()})

    return table


# The rows and columns of each CSV file that the page shows.
HEADLINES: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "rollouts": speedups("transformers", ["policy", "track", "threads"], "k"),
    "rollouts_vllm": speedups("vllm", ["policy", "track"], "k"),
    "grpo_step": speedups("both", ["policy", "track"], "threads"),
    "data": lambda rows: rows[rows.what.str.contains("^both|^tables,")][
        ["what", "cpu_seconds", "peak_megabytes", "goal", "reached"]
    ],
}


def headline(name: str) -> str:
    """Return the headline of a result as a Markdown table."""
    rows = pd.read_csv(RESULTS / f"{name}.csv", dtype=str, keep_default_na=False)
    shown = HEADLINES[name](rows)
    shown.columns = pd.Index([str(column).replace("_", " ") for column in shown.columns])
    return shown.to_markdown(index=False, disable_numparse=True)


def machine_line() -> str:
    """Return the properties of this machine in one line."""
    return "Machine: " + ", ".join(f"{name} {value}" for name, value in machine().items()) + "."


def plot(path: Path) -> None:
    """Plot the speedup of rollouts in CPU time on one thread, and CPU seconds of stages by size."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rollouts = pd.read_csv(RESULTS / "rollouts.csv")
    chosen = rollouts[(rollouts.threads == 1) & (rollouts.contestant == "transformers")]
    for (policy, track), rows in chosen.groupby(["policy", "track"]):
        left.plot(rows.k, rows.speedup_cpu, marker="o", label=f"{policy} policy, {track}")
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(xlabel="rollouts of an item", ylabel="times fewer CPU seconds", ylim=(0, None))
    left.set_xticks(sorted(chosen.k.unique()))
    left.legend()
    for work, rows in pd.read_csv(RESULTS / "growth.csv").groupby("work", sort=False):
        right.plot(rows.factor, rows.cpu_seconds, marker="o", label=str(work).replace("_", " "))
    right.set(xlabel="times the smallest size", ylabel="CPU seconds, start included", yscale="log")
    right.set_xticks([1, 2, 4, 8])
    right.set_yticks([1, 2, 5, 10, 20, 50], labels=["1", "2", "5", "10", "20", "50"])
    right.minorticks_off()
    right.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Write the page and its plot."""

    def generated(match: re.Match[str]) -> str:
        content = machine_line() if match[1] == "machine" else headline(match[1])
        return f"<!-- {match[1]} -->\n\n{content}\n\n<!-- end -->"

    PAGE.write_text(PART.sub(generated, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    plot(PLOT)


if __name__ == "__main__":
    main()
