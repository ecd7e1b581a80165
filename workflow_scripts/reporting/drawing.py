"""Drawings of the figures, one function each: a table in, a matplotlib figure out.

The colours are those of Okabe and Ito (2008), which people with any colour vision can tell apart. A marker or a line
style repeats what a colour says. Only text, axes and background use INK and PAPER, so a page can replace these by its
own colours.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workflow_scripts.reporting.wording import METHODS, POLICIES

INK, PAPER = "#1f2329", "#fffffe"
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # users choose titles of data sets
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.hashsalt": "softpref",  # makes files reproducible
}
matplotlib.use("agg")
matplotlib.rcParams.update(STYLE)

# Colour and marker show the policy, line and filling the method.
COLOURS, MARKERS = {"zeroshot": BLUE, "grpo": VERMILION}, {"zeroshot": "o", "grpo": "s"}
LINES = {"soft": "-", "hard": "--"}
PARTS = {"format": (GREEN, ":"), "exact": (PURPLE, "--"), "approximate": (BLUE, "-.")}
SEEDS = [(BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (PURPLE, ":")]
CURVES = {
    "kl": "KL to the base policy (nats)",
    "entropy": "entropy (nats per token)",
    "completions/mean_length": "completion (tokens)",
    "eval_soft_pair_accuracy": "validation accuracy (%)",
}


def panels(frame: pd.DataFrame, height: float = 2.8, rows: int = 1) -> tuple[Figure, Any]:
    """A figure and its axes (rows, columns), with a column for each case of the table, at least one."""
    columns = max(1, frame["case"].nunique())
    figure = Figure(figsize=(max(6.4, 3.5 * columns), height * rows + 0.4), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def by_case(frame: pd.DataFrame) -> Iterator[tuple[int, str, pd.DataFrame]]:
    """Number, name and rows of each case, in the order of the table."""
    for column, case in enumerate(frame["case"].unique()):
        yield column, case, frame[frame["case"] == case]


def legend(figure: Figure, axes: Any) -> None:
    """Draw one legend below all panels, with each entry once."""
    found: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        columns = 4 if figure.get_figwidth() > 8 else 2
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns)


def interval(axis: Axes, x: Any, rows: pd.DataFrame, scale: float = 100, **style: Any) -> None:
    """Draw points with their intervals, by default shares in percent."""
    mean = rows["mean"].to_numpy(float) * scale
    errors = [mean - rows["low"].to_numpy(float) * scale, rows["high"].to_numpy(float) * scale - mean]
    # A percentile interval may exclude the estimate. An undefined one gets no bar.
    axis.errorbar(x, mean, yerr=np.nan_to_num(np.maximum(errors, 0)), capsize=2.5, elinewidth=1, **style)


def series_style(policy: str, method: str = "soft") -> dict[str, Any]:
    """Style of the points and lines of a policy."""
    filled = {} if method == "soft" else {"markerfacecolor": PAPER}
    return {"color": COLOURS[policy], "marker": MARKERS[policy], "linestyle": LINES[method], **filled}


def series(rows: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any], float, pd.DataFrame]]:
    """Name, style, sideways shift in -1..1 and rows of each policy and method in a panel."""
    groups = list(rows.groupby(["policy", "method"], sort=False))
    for i, (name, group) in enumerate(groups):
        policy, method = map(str, name)
        shift = 2 * i / (len(groups) - 1) - 1 if len(groups) > 1 else 0.0
        yield f"{POLICIES[policy]}, {METHODS[method]}", series_style(policy, method), shift, group


def chance(axis: Axes) -> None:
    """Draw a line at 50 %."""
    axis.axhline(50, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))


def training_curves(frame: pd.DataFrame) -> Figure:
    """Reward with its parts, KL, entropy, length and validation accuracy over the steps of each training.

    The band of a validation is its standard error to both sides.
    """
    figure, axes = panels(frame, 1.55, 1 + len(CURVES))
    for column, case, rows in by_case(frame):
        seeds = list(rows["seed"].unique())
        top = axes[0, column]
        top.set_title(case)
        for seed in seeds:
            own = rows[rows["seed"] == seed]
            total = own[own["metric"] == "reward"]
            top.plot(total["step"], total["value"], color=INK, linewidth=1.8, label="reward, weighted sum")
            for part, (colour, line) in PARTS.items():
                values = own[own["metric"] == f"rewards/{part}/mean"]
                if len(values):
                    top.plot(values["step"], values["value"], color=colour, linestyle=line, label=f"{part} reward")
            colour, line = SEEDS[seeds.index(seed) % len(SEEDS)]
            for row, metric in enumerate(CURVES, 1):
                values = own[own["metric"] == metric]
                scale = 100 if metric.startswith("eval") else 1
                mean, error = values["value"] * scale, values["se"].astype(float) * scale
                axes[row, column].plot(
                    values["step"],
                    mean,
                    color=colour,
                    linestyle=line,
                    marker="o" if metric.startswith("eval") else None,
                    label=f"seed {seed}",
                )
                if error.notna().any():
                    axes[row, column].fill_between(
                        values["step"], mean - error, mean + error, color=colour, alpha=0.2, linewidth=0
                    )
        for row, name in enumerate(["reward", *CURVES.values()]):
            axes[row, column].set_ylabel(name.replace(" (", "\n("))
            axes[row, column].xaxis.get_major_locator().set_params(integer=True)
        axes[-1, column].set_xlabel("step")
    legend(figure, axes)
    return figure


def mean_at_k(frame: pd.DataFrame) -> Figure:
    """Accuracy against the number of averaged rollouts, and against the tokens that they take."""
    figure, axes = panels(frame, 2.7, 2)
    for column, case, rows in by_case(frame):
        for label, style, shift, group in series(rows):
            interval(axes[0, column], group["k"] + 0.04 * shift, group, label=label, **style)
            interval(axes[1, column], group["tokens"], group, label=label, **style)
        axes[0, column].set_title(case)
        axes[0, column].set_xticks(sorted(rows["k"].unique()))
        axes[0, column].set_xlabel("k, rollouts averaged")
        axes[1, column].set_xlabel("tokens generated per item")
        axes[1, column].set_xlim(left=0)
        for axis in axes[:, column]:
            axis.set_ylabel("accuracy (%)")
            chance(axis)
    legend(figure, axes)
    return figure


def calibration_pairs(frame: pd.DataFrame) -> Figure:
    """Reliability diagrams: how often people agree with a probability, and how often the policy gave it."""
    figure, axes = panels(frame, 2.7, 2)
    for column, case, rows in by_case(frame):
        top, bottom = axes[:, column]
        top.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        groups = list(rows.groupby(["policy", "rollouts"], sort=False))
        for i, (_, group) in enumerate(groups):
            policy, rollouts = group[["policy", "rollouts"]].iloc[0]
            style = series_style(policy, "soft" if rollouts > 1 else "hard")
            named = "one rollout" if rollouts == 1 else f"mean of {rollouts}"
            label = f"{POLICIES[policy]}, {named}"
            interval(top, group["predicted"] * 100, group, label=label, **style)
            width = (group["bin_high"] - group["bin_low"]) * 100 / (len(groups) + 1)
            bottom.bar(
                group["bin_low"] * 100 + width * (i + 1),
                group["count"] / group["count"].sum() * 100,
                width,
                color=style["color"] if rollouts > 1 else "none",
                edgecolor=style["color"],
                hatch=None if rollouts > 1 else "////",
            )
        top.set_title(case)
        top.set_ylabel("people agree (%)")
        bottom.set_ylabel("share of pairs (%)")
        bottom.set_xlabel("probability given (%)")
        for axis in (top, bottom):
            axis.set_xlim(0, 100)
        top.set_ylim(-3, 103)
    legend(figure, axes)
    return figure


def calibration_ratings(frame: pd.DataFrame) -> Figure:
    """Mean human rating against expected rating, and the share of images in each bin."""
    figure, axes = panels(frame, 2.7, 2)
    for column, case, rows in by_case(frame):
        top, bottom = axes[:, column]
        top.plot([1, 7], [1, 7], color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        for i, (policy, group) in enumerate(rows.groupby("policy", sort=False)):
            style = series_style(str(policy))
            interval(top, group["predicted"], group, scale=1, label=POLICIES[str(policy)], **style)
            width = (group["bin_high"] - group["bin_low"]) / 3
            bottom.bar(
                group["bin_low"] + width * (i + 1),
                group["count"] / group["count"].sum() * 100,
                width,
                color=style["color"] if policy == "grpo" else "none",
                edgecolor=style["color"],
                hatch=None if policy == "grpo" else "////",
            )
        top.set_title(case)
        top.set_ylabel("mean human rating")
        bottom.set_ylabel("share of images (%)")
        bottom.set_xlabel("expected rating, mean of the rollouts")
        for axis in (top, bottom):
            axis.set_xlim(0.8, 7.2)
        top.set_ylim(0.8, 7.2)
    legend(figure, axes)
    return figure


def answers(frame: pd.DataFrame) -> Figure:
    """Shares of the answers before and after training, in validation and on the test set."""
    sources = list(frame["source"].unique()) or ["test"]
    figure, axes = panels(frame, 2.3, len(sources))
    looks: dict[str, dict[str, Any]] = {
        "before": {"facecolor": "none", "edgecolor": BLUE, "hatch": "////"},
        "after": {"facecolor": VERMILION, "edgecolor": VERMILION},
        "people": {"facecolor": "none", "edgecolor": INK, "linewidth": 1.2},
    }
    for column, case, rows in by_case(frame):
        names = list(dict.fromkeys(rows["answer"]))
        for row, source in enumerate(sources):
            axis = axes[row, column]
            chosen = rows[rows["source"] == source]
            present = list(dict.fromkeys(chosen["when"]))
            for i, when in enumerate(present):
                group = chosen[chosen["when"] == when]
                x = group["answer"].map(names.index) + (i - (len(present) - 1) / 2) * 0.8 / len(present)
                label = {"before": "before training", "after": "after training", "people": "human ratings"}[when]
                axis.bar(x, group["share"] * 100, 0.72 / len(present), label=label, **looks[when])
            axis.set_xticks(range(len(names)), names)
            axis.set_title(f"{case}, {source}" if row == 0 else source)
            axis.set_ylabel("share (%)")
        axes[-1, column].set_xlabel("sampled answer")
    legend(figure, axes)
    return figure


def _grouped(frame: pd.DataFrame, group: str, xlabel: str, ylabel: str = "accuracy (%)") -> Figure:
    """Accuracy of each policy and method over the groups of a column."""
    figure, axes = panels(frame)
    for column, case, rows in by_case(frame):
        axis = axes[0, column]
        names = list(dict.fromkeys(rows[group]))
        if all(isinstance(name, int | float) for name in names):
            names = sorted(names)
        for label, style, shift, points in series(rows):
            interval(axis, points[group].map(names.index) + 0.12 * shift, points, label=label, **style)
        shown = [f"{name:g}" if isinstance(name, int | float) else str(name) for name in names]
        axis.set_xticks(range(len(names)), shown)
        axis.set_title(case)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        chance(axis)
    legend(figure, axes)
    return figure


def rank_distance(frame: pd.DataFrame) -> Figure:
    """Accuracy against the difference of the human ranks."""
    return _grouped(frame, "distance", "difference of the human ranks")


def confidence(frame: pd.DataFrame) -> Figure:
    """Accuracy on fifths of the pairs, from the smallest to the largest difference of the scores."""
    return _grouped(frame, "fifth", "fifth of the pairs by score difference")


def anchor_rank(frame: pd.DataFrame) -> Figure:
    """Accuracy against the human rank of the anchor."""
    return _grouped(frame, "anchor_rank", "human rank of the anchor, 1 best")


def tie_rules(frame: pd.DataFrame) -> Figure:
    """The same accuracy under every tie rule."""
    return _grouped(frame, "tie", "what equal scores count as")


def presentation_order(frame: pd.DataFrame) -> Figure:
    """Accuracy by place of the candidate, and how often the second image is preferred."""
    figure, axes = panels(frame)
    for column, case, rows in by_case(frame):
        axis = axes[0, column]
        names = list(dict.fromkeys(rows["order"]))
        for label, style, shift, points in series(rows):
            x = points["order"].map(names.index) + 0.12 * shift
            interval(axis, x, points, label=label, **style | {"linestyle": "none"})
        axis.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
        axis.set_title(case)
        axis.set_ylabel("%")
        chance(axis)
    legend(figure, axes)
    return figure


def nothing(reason: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = Figure(figsize=(6.4, 1.2))
    figure.text(0.5, 0.5, reason, ha="center", va="center")
    return figure


def save(figure: Figure, path: Path, kind: str) -> None:
    """Write a figure as "svg" or "png", the same bytes for the same figure."""
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(path, format=kind, dpi=160, metadata=metadata)


def inline_svg(text: str, name: str) -> str:
    """An SVG file of `save` as an element of a page, in the colours of the page and with unique ids.

    Args:
        text: the file.
        name: unique in the page; ids of the file begin with it.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    # The page sets its size and its label.
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r'<svg\1 aria-hidden="true"', text, count=1)
    colours = {BLUE: "var(--blue)", VERMILION: "var(--vermilion)", GREEN: "var(--green)", PURPLE: "var(--purple)"}
    for drawn, of_page in {INK: "currentColor", PAPER: "var(--paper)", **colours}.items():
        text = text.replace(drawn, of_page)
    return text
