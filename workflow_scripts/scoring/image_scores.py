"""From the answers of a policy to scores, soft and hard: of single rollouts, and of images."""

import numpy as np
import pandas as pd

from workflow_scripts.scoring.anchor_ranking import anchor_scores, candidate_probability
from workflow_scripts.scoring.pair_accuracy import expected_answer


def rollout_scores(rollouts: pd.DataFrame, answers: tuple[int, ...]) -> pd.DataFrame:
    """Score each rollout, and resolve the presentation order of pairs: all that is added is about the candidate.

    Args:
        rollouts: columns answer_logprobs, sampled_answer, anchor and candidate_second of `rollouts.record.ROLLOUT`, all
            of one protocol.
        answers: the A numbers that the answer tokens stand for, in ascending order.

    Returns:
        The rollouts with four more columns. answer_probabilities: (A,) float64, as the policy gave them. probabilities:
        the same, but for pairs in the order anchor, candidate. soft: float64, the expected rating, or the probability
        that the candidate is preferred over the anchor. hard: the same of the sampled answer alone; nan: none is valid.
    """
    logprobs = np.array(rollouts["answer_logprobs"].to_list(), np.float64).reshape(len(rollouts), len(answers))
    weights = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    given = weights / weights.sum(axis=1, keepdims=True)
    probabilities, soft = given, expected_answer(logprobs, answers)
    hard = rollouts["sampled_answer"].astype("float64").to_numpy()
    if rollouts["anchor"].notna().any():
        second = rollouts["candidate_second"].to_numpy(bool)
        probabilities = np.where(second[:, None], given, given[:, ::-1])
        soft, hard = candidate_probability(soft, second), candidate_probability(hard, second)
    return rollouts.assign(answer_probabilities=list(given), probabilities=list(probabilities), soft=soft, hard=hard)


def image_scores(scored: pd.DataFrame) -> pd.DataFrame:
    """Score images by their rollouts: expected ratings, or probabilities of being preferred over the prompt's anchor.

    Args:
        scored: rollouts with `rollout_scores`; those of a pair may be several comparisons.

    Returns:
        Columns prompt_id, image_id, k, soft, hard (nan: no valid sampled answer) and forced (share of the rollouts
        behind it that were forced, nan for an anchor), a row for each image and k.
    """
    frame = scored[["item_id", "prompt_id", "k", "soft", "hard"]].assign(
        image_id=scored["candidate"], forced=scored["forced"].astype("float64")
    )
    if scored["anchor"].isna().all():
        return frame
    return _against_anchors(frame, scored.groupby("prompt_id")["anchor"].first())


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
