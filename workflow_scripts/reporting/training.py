"""What training changed: its curves, and the answers of a policy before and after it."""

from collections import defaultdict

import numpy as np
import pandas as pd

from workflow_scripts.policy.prompts import ANSWERS
from workflow_scripts.reporting.drawing import CURVES, PARTS
from workflow_scripts.reporting.policies import Policies
from workflow_scripts.scoring.judged_prompts import JudgedPrompt


def training_curves(policies: Policies) -> pd.DataFrame:
    """Every drawn curve of every training, as recorded, with the standard errors of the validations."""
    rows = [
        {"case": policies.head(track, "grpo", track)["case"], "track": track, "seed": seed}
        | {"metric": metric, "step": entry["step"], "value": entry[metric], "se": entry.get(f"{metric}_se")}
        for (track, seed), record in policies.trainings.items()
        for entry in record["history"]
        for metric in ("reward", *(f"rewards/{part}/mean" for part in PARTS), *CURVES)
        if metric in entry
    ]
    return pd.DataFrame(rows)


def answers(policies: Policies) -> pd.DataFrame:
    """Share of each sampled answer before and after training: in validation, and on the policy's own test set.

    Shares of policies that are not in the run are left out, and so is validation where nothing was trained.
    """
    tables = []
    for track in dict.fromkeys(track for track, _, test in policies.recorded if track == test):
        rows = [*_validation_shares(policies, track), *_test_shares(policies, track)]
        table = pd.DataFrame(rows, columns=["source", "when", "answer", "share"])
        tables.append(table.assign(track=track, case=policies.head(track, "grpo", track)["case"]))
    return pd.concat(tables, ignore_index=True)


def _names(policies: Policies, track: str) -> list[str]:
    """Valid answers, and "none"."""
    return [*map(str, ANSWERS[policies.config.tracks[track]]), "none"]


def _validation_shares(policies: Policies, track: str) -> list[tuple[str, str, str, float]]:
    """(source, when, answer, share) at step 0 and at the step of the selected adapter, means over the seeds."""
    rows = []
    records = [record for (name, _), record in policies.trainings.items() if name == track]
    for when in ("before", "after") if records else ():
        shares: defaultdict[str, list[float]] = defaultdict(list)
        for record in records:
            step = 0 if when == "before" else record["kept_step"]
            entry = next(h for h in record["history"] if h["step"] == step and "eval_largest_answer_share" in h)
            for name in _names(policies, track):
                shares[name].append(entry[f"eval_answer_share/{name.replace('none', 'None')}"])
        rows += [("validation", when, name, float(np.mean(values))) for name, values in shares.items()]
    return rows


def _test_shares(policies: Policies, track: str) -> list[tuple[str, str, str, float]]:
    """(source, when, answer, share) on the own test set, with the human ratings where there are some."""
    rows = []
    names = _names(policies, track)
    prompts: list[JudgedPrompt] = []
    for when, policy in (("before", "zeroshot"), ("after", "grpo")):
        if (track, policy, track) not in policies.recorded:
            continue
        prompts = policies.recorded[track, policy, track][0].prompts
        given = pd.concat([seed.rollouts["sampled_answer"] for seed in policies.recorded[track, policy, track]])
        said = given.map(lambda answer: "none" if pd.isna(answer) else str(int(answer)))
        counts = said.value_counts(normalize=True)
        rows += [("test", when, name, float(counts.get(name, 0.0))) for name in names]
    ratings = [prompt.ratings for prompt in prompts if prompt.ratings is not None]
    if not policies.pairwise(track) and len(ratings) == len(prompts):
        rated = np.concatenate(ratings)
        rows += [("test", "people", name, float(np.mean(rated == float(name)))) for name in names[:-1]]
    return rows
