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
    logprobs = np.concatenate(rollouts["answer_logprobs"].to_list()).reshape(len(rollouts), len(answers))
    frame = rollouts[["item_id", "prompt_id", "k", "forced"]].assign(
        image_id=rollouts["candidate"],
        soft=expected_answer(logprobs, answers),
        hard=rollouts["sampled_answer"].astype("float64"),
        forced=rollouts["forced"].astype("float64"),
    )
    if rollouts["anchor"].isna().all():
        return frame
    for column in ("soft", "hard"):
        frame[column] = candidate_probability(frame[column], rollouts["candidate_second"].astype(bool))
    return _against_anchors(frame, rollouts.groupby("prompt_id")["anchor"].first())


def _against_anchors(frame: pd.DataFrame, anchors: pd.Series) -> pd.DataFrame:
    """Scores of the images of all prompts, the anchors among them; both presentation orders of a pair are averaged."""
    columns: dict[str, np.ndarray] = {}
    for column in ("soft", "hard", "forced"):
        table = frame.pivot(index=["item_id", "prompt_id", "image_id"], columns="k", values=column)
        compared = table.index.droplevel("item_id")  # type: ignore[arg-type]
        images = pd.MultiIndex.from_frame(anchors.reset_index()).append(compared.unique())
        scores = anchor_scores(len(images), np.arange(len(anchors)), images.get_indexer(compared), table.to_numpy())
        columns[column] = scores.ravel()
    columns["forced"][: len(anchors) * table.shape[1]] = np.nan
    index = pd.MultiIndex.from_arrays(
        [
            images.get_level_values(0).repeat(table.shape[1]),
            images.get_level_values(1).repeat(table.shape[1]),
            np.tile(table.columns, len(images)),
        ],
        names=["prompt_id", "image_id", "k"],
    )
    return pd.DataFrame(columns, index=index).reset_index()
