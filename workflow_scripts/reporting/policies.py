"""What the figures are made of: all that was recorded of the policies of a run."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from workflow_scripts.configuration.stages import MakeFigures
from workflow_scripts.policy.prompts import ANSWERS
from workflow_scripts.preferences.schema import SUBSET, read_table
from workflow_scripts.reporting.wording import dataset_titles, track_titles
from workflow_scripts.rollouts.record import ROLLOUT, read_rollouts
from workflow_scripts.scoring.bootstrap import Resampling
from workflow_scripts.scoring.image_scores import rollout_scores
from workflow_scripts.scoring.judged_prompts import JudgedPrompt, judged_prompts
from workflow_scripts.scoring.protocols import NEUTRAL

UNUSED = ("text", "seed")  # columns of rollouts; the texts are most of a file

Key = tuple[str, str, str]  # track, policy and test set


class Recorded(NamedTuple):
    """What was recorded of a policy of one seed on one test set."""

    prompts: list[JudgedPrompt]
    rollouts: pd.DataFrame
    """Rollouts with `rollout_scores` and their number of `tokens`."""


@dataclass
class Policies:
    """Everything recorded of every policy."""

    config: MakeFigures
    recorded: dict[Key, list[Recorded]] = field(default_factory=lambda: defaultdict(list))
    """One entry for each seed."""
    trainings: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    """Training records by track and seed."""

    @property
    def resampling(self) -> Resampling:
        """How intervals are made."""
        return Resampling(**self.config.bootstrap.model_dump())

    def head(self, track: str, policy: str, test: str) -> dict[str, str]:
        """First columns of most tables: the case (a panel of its figure), track, test set and policy."""
        case = f"{track_titles(self.config.own_title)[track]} ({self.config.tracks[track]})"
        case += "" if track == test else f" on {dataset_titles(self.config.own_title)[test]}"
        return {"case": case, "track": track, "test": test, "policy": policy}

    def pairwise(self, track: str) -> bool:
        """Whether a track's policies compare pairs."""
        return self.config.tracks[track] == "pairwise"

    def neutral(self, track: str) -> float:
        """The score of a track's policies that prefers nothing."""
        return NEUTRAL[self.config.tracks[track]]

    def rollouts(self, key: Key) -> int:
        """Number of recorded rollouts of each item."""
        return min(int(one.rollouts["k"].max()) + 1 for one in self.recorded[key])


def read_policies(
    rollouts: list[Path],
    scores: list[Path],
    subsets: list[Path],
    adapters: list[Path],
    configs: Mapping[Path, dict[str, Any]],
    config: MakeFigures,
) -> Policies:
    """Read everything recorded of every policy.

    Args:
        rollouts: rollout files of every policy, test set and seed.
        scores: their scores.
        subsets: prompts of every test set.
        adapters: adapters of the trained policies; their training records stand beside them.
        configs: configuration of the job that made each of these files.
        config: of the figures.
    """
    found = Policies(config)
    rows = {configs[path]["dataset"]: read_table(path, SUBSET).to_pylist() for path in subsets}
    files = defaultdict(list)
    for path in rollouts:
        files[tuple(configs[path][name] for name in ("track", "policy", "test", "seed"))].append(path)
    columns = [name for name in ROLLOUT.names if name not in UNUSED]
    for path in scores:
        track, policy, test, seed = (configs[path][name] for name in ("track", "policy", "test", "seed"))
        table = read_rollouts(files[track, policy, test, seed], columns)
        table = rollout_scores(table, ANSWERS[config.tracks[track]]).assign(tokens=table["completion_ids"].map(len))
        prompts = judged_prompts(rows[test], pd.read_parquet(path))
        found.recorded[track, policy, test].append(
            Recorded(prompts, table.drop(columns=["completion_ids", "answer_logprobs", "answer_probabilities"]))
        )
    for path in adapters:
        record = json.loads(path.with_name("training.json").read_text(encoding="utf-8"))
        found.trainings[configs[path]["track"], configs[path]["seed"]] = record
    return found
