"""The figures of a run: what each is called, the table that it shows, and how that is drawn.

The table is the truth: it is written as CSV, and the drawing is made from it alone. The caption of a figure is
captions/NAME.rst. A new figure stands here, in its section of templates/report.html.jinja, and, since the Snakefile
asks for it, in configuration.targets.FIGURES.
"""

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from workflow_scripts.reporting import agreement, calibration, comparisons, drawing, training
from workflow_scripts.reporting.policies import Policies

POLICY = ["case", "track", "test", "policy"]
METHOD = [*POLICY, "method"]
INTERVAL = ["mean", "low", "high"]
BIN = ["bin_low", "bin_high", "predicted", *INTERVAL, "count"]


class Plot(NamedTuple):
    """One figure."""

    title: str
    columns: list[str]
    """Of its table."""
    table: Callable[[Policies], pd.DataFrame]
    """Without a row, and then without columns, where no policy can be shown so."""
    draw: Callable[[pd.DataFrame], Figure]


FIGURES = {
    "training_curves": Plot(
        "Training curves",
        ["case", "track", "seed", "metric", "step", "value", "se"],
        training.training_curves,
        drawing.training_curves,
    ),
    "mean_at_k": Plot("Mean@k", [*METHOD, "k", "tokens", *INTERVAL], agreement.mean_at_k, drawing.mean_at_k),
    "calibration_pairs": Plot(
        "Reliability of pairs",
        [*POLICY, "rollouts", *BIN, "brier", "ece"],
        calibration.calibration_pairs,
        drawing.calibration_pairs,
    ),
    "calibration_ratings": Plot(
        "Expected and human rating",
        [*POLICY, *BIN, "rmse"],
        calibration.calibration_ratings,
        drawing.calibration_ratings,
    ),
    "answers": Plot(
        "Answers before and after training",
        ["case", "track", "source", "when", "answer", "share"],
        training.answers,
        drawing.answers,
    ),
    "rank_distance": Plot(
        "Agreement by rank distance",
        [*METHOD, "distance", *INTERVAL, "count"],
        agreement.rank_distance,
        drawing.rank_distance,
    ),
    "confidence": Plot(
        "Agreement by score difference",
        [*METHOD, "fifth", *INTERVAL, "count"],
        agreement.confidence,
        drawing.confidence,
    ),
    "tie_rules": Plot("Tie rules", [*METHOD, "k", "tie", *INTERVAL], agreement.tie_rules, drawing.tie_rules),
    "presentation_order": Plot(
        "Presentation order",
        [*METHOD, "order", *INTERVAL, "count"],
        comparisons.presentation_order,
        drawing.presentation_order,
    ),
    "anchor_rank": Plot(
        "Anchor",
        [*METHOD, "anchor_rank", *INTERVAL, "count"],
        agreement.anchor_rank,
        drawing.anchor_rank,
    ),
}
