"""From the answers of a policy to scores of images: soft, and hard from the sampled answer."""

import numpy as np
import pandas as pd

from workflow_scripts.scoring.anchor_ranking import anchor_scores, candidate_probability
from workflow_scripts.scoring.pair_accuracy import expected_answer


def image_scores(rollouts: pd.DataFrame, answers: tuple[int, ...]) -> pd.DataFrame:
    """Expected ratings, or probabilities of being preferred over the prompt's anchor (paper, section 3).

    Args:
        rollouts: columns of `rollouts.record.ROLLOUT`, of one protocol; those of a pair may be several comparisons.
        answers: the numbers that the answer tokens stand for.

    Returns:
        Columns prompt_id, image_id, k, soft, hard (nan: no valid sampled answer) and forced (share of the rollouts
        behind it that were forced, nan for an anchor), a row for each image and k.
    """
    frame = rollouts[["item_id", "prompt_id", "k", "forced"]].assign(
        image_id=rollouts["candidate"],
        soft=expected_answer(np.stack(list(rollouts["answer_logprobs"])), answers),
        hard=rollouts["sampled_answer"].astype("float64"),
        forced=rollouts["forced"].astype("float64"),
    )
    if rollouts["anchor"].isna().all():
        return frame
    for column in ("soft", "hard"):
        frame[column] = candidate_probability(frame[column], rollouts["candidate_second"].astype(bool))
    anchors = rollouts.groupby("prompt_id")["anchor"].first()
    return pd.concat([_against_anchor(group, str(anchors[name])) for name, group in frame.groupby("prompt_id")])


def _against_anchor(frame: pd.DataFrame, anchor: str) -> pd.DataFrame:
    """Scores of one prompt's images, the anchor's among them; both presentation orders of a pair are averaged."""
    names = [anchor, *sorted(set(frame["image_id"]))]
    columns = {}
    for column in ("soft", "hard", "forced"):
        table = frame.pivot(index=["item_id", "image_id"], columns="k", values=column)
        candidates = [names.index(image) for image in table.index.get_level_values("image_id")]
        columns[column] = anchor_scores(len(names), 0, candidates, table.to_numpy()).ravel()
    index = pd.MultiIndex.from_product([names, table.columns], names=["image_id", "k"])
    scored = pd.DataFrame(columns, index=index).reset_index().assign(prompt_id=frame["prompt_id"].iloc[0])
    scored.loc[scored["image_id"] == anchor, "forced"] = np.nan
    return scored
