"""The training curves: what the figure is made of, and what is drawn of it."""

import numpy as np
import pytest

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import MakeFigures
from workflow_scripts.reporting import drawing, training
from workflow_scripts.reporting.figures import FIGURES
from workflow_scripts.reporting.policies import Policies

NAME = "eval_soft_pair_accuracy"


def test_a_validation_has_a_band_of_its_standard_error() -> None:
    history = [
        {"step": 0, NAME: 0.5, f"{NAME}_se": 0.04},
        {"step": 1, "reward": 1.0, "kl": 0.0},
        {"step": 2, NAME: 0.6, f"{NAME}_se": 0.03},
    ]
    policies = Policies(MakeFigures.of(Configuration()))
    policies.trainings["hpsv2", 0] = {"history": history}
    table = training.training_curves(policies).reindex(columns=FIGURES["training_curves"].columns)
    validations = table[table["metric"] == NAME]
    assert validations["se"].tolist() == [0.04, 0.03] and table["se"].notna().sum() == 2

    *others, axis = drawing.training_curves(table).axes
    assert [len(other.collections) for other in others] == [0] * len(others)
    (band,) = axis.collections
    corners = band.get_paths()[0].vertices
    for step, low, high in ((0, 46, 54), (2, 57, 63)):
        heights = corners[corners[:, 0] == step, 1]
        assert (np.min(heights), np.max(heights)) == pytest.approx((low, high))
