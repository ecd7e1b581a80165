"""Put what was measured into docs/performance.md: tables of results/*.csv, the machine, the plot.

python -m benchmarks.page

What stands between `<!-- name -->` and `<!-- end -->` is made anew; the text around it is written by hand.
"""

import re
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.measuring import RESULTS, machine
from workflow_scripts.files.paths import ROOT

PAGE = ROOT / "docs/performance.md"
PLOT = ROOT / "docs/images/performance.png"
PART = re.compile(r"<!-- ([a-z_]+) -->\n.*?<!-- end -->", re.DOTALL)


def table(name: str) -> str:
    """A result as a table of Markdown; empty where nothing was measured."""
    rows = pd.read_csv(RESULTS / f"{name}.csv", dtype=str, keep_default_na=False)
    rows.columns = pd.Index([column.replace("_", " ") for column in rows.columns])
    return rows.to_markdown(index=False)


def plot(path: Path) -> None:
    """Times fewer CPU seconds than with `generate` that rollouts take on one thread, and how CPU seconds grow."""
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

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name == "machine":
            content = "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in machine().items())])
        else:
            content = table(name)
        return f"<!-- {name} -->\n\n{content}\n\n<!-- end -->"

    PAGE.write_text(PART.sub(made, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    plot(PLOT)


if __name__ == "__main__":
    main()
