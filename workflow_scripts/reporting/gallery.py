"""The gallery: prompts of a test set with their images in predicted and in human order, and the reasoning."""

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from workflow_scripts.scoring.judged_prompts import JudgedPrompt
from workflow_scripts.scoring.pair_accuracy import credit, pair_outcomes, strict_pairs

LONGEST_SIDE = 256  # pixels of a picture in the gallery

GALLERY_ROLLOUT = pa.struct(
    [
        ("k", pa.int32()),
        ("text", pa.string()),
        ("answer_probabilities", pa.list_(pa.float64())),  # of the answers in ascending order, as the policy gave them
        ("soft", pa.float64()),  # score of this image by this rollout alone
        ("sampled_answer", pa.int8()),  # null: none, or not a valid one
        ("forced", pa.bool_()),  # the engine closed the thinking
        ("second", pa.bool_()),  # pairs: this image was shown second; null: it was shown alone
    ]
)

GALLERY = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),  # test set
        pa.field("track", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("seed", pa.int32(), nullable=False),
        pa.field("k", pa.int32(), nullable=False),  # rollouts averaged
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # WebP, at most LONGEST_SIDE
        pa.field("width", pa.int32(), nullable=False),  # of `image`
        pa.field("height", pa.int32(), nullable=False),
        pa.field("anchor", pa.bool_(), nullable=False),  # pairs: the image that the others were compared with
        pa.field("human_rank", pa.float64()),  # 1 = best of the images that are here, ties share
        pa.field("human_rating", pa.float64()),  # 1 to 7
        pa.field("predicted_rank", pa.int32(), nullable=False),  # 1 = best, ties share
        pa.field("score", pa.float64(), nullable=False),  # soft, mean over the k rollouts
        pa.field("score_se", pa.float64()),  # null: an anchor, or fewer than two rollouts
        pa.field("pairs", pa.int32(), nullable=False),  # strictly ranked human pairs that contain this image
        pa.field("pairs_right", pa.float64(), nullable=False),  # of these ordered right, a tie counting half
        pa.field("right", pa.bool_()),  # more than half of its pairs are; null: it has none
        pa.field("confidence", pa.float64(), nullable=False),
        pa.field(
            "distribution", pa.list_(pa.float64())
        ),  # mean of the answers, or of anchor and image; null: an anchor
        pa.field("rollouts", pa.list_(GALLERY_ROLLOUT), nullable=False),  # none: an anchor
    ]
)


def gallery_rows(
    prompts: Iterable[JudgedPrompt], rollouts: pd.DataFrame, pictures: Mapping[str, Image.Image]
) -> Iterator[dict[str, Any]]:
    """Rows of GALLERY without dataset, track, policy and seed, prompt by prompt, best predicted image first.

    Args:
        prompts: of a test set.
        rollouts: their rollouts with `scoring.image_scores.rollout_scores`.
        pictures: the images that could be read, by image_id.
    """
    by_image = defaultdict(list)
    for row in rollouts.sort_values(["k", "item_id"]).to_dict("records"):
        by_image[row["prompt_id"], row["candidate"]].append(row)
    anchors = rollouts.groupby("prompt_id")["anchor"].first().to_dict()
    for prompt in prompts:
        kept = [i for i, image in enumerate(prompt.image_ids) if image in pictures]
        scores = prompt.scores["soft"][kept]
        k = scores.shape[1]
        means = np.array([np.mean(values) for values in scores])
        ranks = None if prompt.ranks is None else prompt.ranks[kept]
        pairs, right = pairs_by_image(means, ranks)
        behind = [by_image[prompt.prompt_id, prompt.image_ids[i]] for i in kept]
        distributions = [np.mean([row["probabilities"] for row in rows], axis=0) if rows else None for rows in behind]
        certain = [None if distribution is None else confidence(distribution) for distribution in distributions]
        found = []
        for i, place in enumerate(kept):
            image = prompt.image_ids[place]
            anchor = image == anchors.get(prompt.prompt_id)
            picture, (width, height) = encoded(pictures[image])
            found.append(
                {
                    "prompt_id": prompt.prompt_id,
                    "prompt": prompt.prompt,
                    "k": k,
                    "image_id": image,
                    "image": picture,
                    "width": width,
                    "height": height,
                    "anchor": anchor,
                    "human_rank": None if ranks is None else 1.0 + int((ranks < ranks[i]).sum()),
                    "human_rating": None if prompt.ratings is None else float(prompt.ratings[place]),
                    "predicted_rank": 1 + int((means > means[i]).sum()),
                    "score": float(means[i]),
                    "score_se": None if anchor or k < 2 else float(np.std(scores[i], ddof=1) / math.sqrt(k)),
                    "pairs": int(pairs[i]),
                    "pairs_right": float(right[i]),
                    "right": bool(2 * right[i] > pairs[i]) if pairs[i] else None,
                    # An anchor takes part in all comparisons of its prompt.
                    "confidence": float(np.mean([c for c in certain if c is not None])) if anchor else certain[i],
                    "distribution": distributions[i],
                    "rollouts": [shown_rollout(row) for row in behind[i]],
                }
            )
        yield from sorted(found, key=lambda row: (row["predicted_rank"], row["image_id"]))


def shown_rollout(row: Mapping[Any, Any]) -> dict[str, Any]:
    """GALLERY_ROLLOUT of a rollout with its scores."""
    return {
        "k": row["k"],
        "text": row["text"],
        "answer_probabilities": row["answer_probabilities"],
        "soft": row["soft"],
        "sampled_answer": None if pd.isna(row["sampled_answer"]) else int(row["sampled_answer"]),
        "forced": row["forced"],
        "second": row["candidate_second"],
    }


def confidence(distribution: NDArray[np.float64]) -> float:
    """How concentrated the answers to an image are: 1 - H(p) / log A, in [0, 1].

    p (A,) is the mean over the rollouts of the probabilities of the A answers, H its entropy in nats. 1 is always the
    same answer with certainty; 0 is every answer equally likely, in one rollout or over all of them.
    """
    p = distribution
    entropy = -float(np.sum(p[p > 0] * np.log(p[p > 0])))
    return min(1.0, max(0.0, 1 - entropy / math.log(len(p))))


def pairs_by_image(scores: ArrayLike, ranks: ArrayLike | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each of N images: number of strict human pairs with it, and how many of these the scores order right.

    Args:
        scores: (N,), higher is better; a tie counts half.
        ranks: (N,), lower is better; None: there is no human order, so no pair.
    """
    scores = np.asarray(scores)
    pairs, right = np.zeros(len(scores)), np.zeros(len(scores))
    if ranks is not None:
        better, worse = strict_pairs(ranks)
        credits = credit(pair_outcomes(scores, better, worse), "half", "wrong")
        for side in (better, worse):
            np.add.at(pairs, side, 1)
            np.add.at(right, side, credits)
    return pairs, right


def encoded(picture: Image.Image) -> tuple[bytes, tuple[int, int]]:
    """WebP of a picture with its width and height: scaled down to LONGEST_SIDE, or lossless if it is no larger."""
    small = picture.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    small.save(file, "WEBP", lossless=small.size == picture.size, quality=85)
    return file.getvalue(), small.size
