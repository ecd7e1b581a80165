"""The gallery: prompts of a test set with their images in predicted and in human order, and the thoughts behind it."""

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from workflow_scripts.scoring.anchor_ranking import candidate_probability
from workflow_scripts.scoring.pair_accuracy import credit, expected_answer, pair_outcomes, strict_pairs

LONGEST_SIDE = 256  # pixels of a picture in the gallery

GALLERY_ROLLOUT = pa.struct(
    [
        ("k", pa.int32()),
        ("text", pa.string()),
        ("answer_probabilities", pa.list_(pa.float64())),  # over the answers in ascending order
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
        pa.field("rollouts", pa.list_(GALLERY_ROLLOUT), nullable=False),  # none: an anchor
    ]
)


def gallery_rows(
    prompts: Iterable[Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, list[float]]],
    rollouts: Iterable[Mapping[str, Any]],
    pictures: Mapping[str, Image.Image],
    answers: tuple[int, ...],
) -> Iterator[dict[str, Any]]:
    """Rows of GALLERY without dataset, track, policy and seed, prompt by prompt, best predicted image first.

    Args:
        prompts: rows of `preferences.schema.SUBSET`; one without a scored image is left out.
        scores: soft scores of each rollout by prompt_id and image_id.
        rollouts: rows of `rollouts.record.ROLLOUT` of these prompts.
        pictures: the images that could be read, by image_id.
        answers: the numbers that the answer tokens stand for.
    """
    by_image = defaultdict(list)
    anchors = {}
    for row in sorted(rollouts, key=lambda row: (row["k"], row["item_id"])):
        by_image[row["prompt_id"], row["candidate"]].append(shown_rollout(row, answers))
        anchors[row["prompt_id"]] = row["anchor"]
    for prompt in prompts:
        name, scored = prompt["prompt_id"], scores.get(prompt["prompt_id"], {})
        kept = [i for i, image in enumerate(prompt["image_ids"]) if image in scored and image in pictures]
        if not kept:
            continue
        images = [prompt["image_ids"][i] for i in kept]
        means = np.array([np.mean(scored[image]) for image in images])
        ranks = [prompt["ranks"][i] for i in kept] if prompt["ranks"] else None
        pairs, right = judged_pairs(means, ranks)
        certain = {image: confidence(by_image[name, image]) for image in images if by_image[name, image]}
        found = []
        for i, image in enumerate(images):
            anchor = image == anchors.get(name)
            picture, (width, height) = encoded(pictures[image])
            k = len(scored[image])
            found.append(
                {
                    "prompt_id": name,
                    "prompt": prompt["prompt"],
                    "k": k,
                    "image_id": image,
                    "image": picture,
                    "width": width,
                    "height": height,
                    "anchor": anchor,
                    "human_rank": None if ranks is None else 1.0 + sum(other < ranks[i] for other in ranks),
                    "human_rating": None if prompt["ratings"] is None else float(prompt["ratings"][kept[i]]),
                    "predicted_rank": 1 + int((means > means[i]).sum()),
                    "score": float(means[i]),
                    "score_se": None if anchor or k < 2 else float(np.std(scored[image], ddof=1) / math.sqrt(k)),
                    "pairs": int(pairs[i]),
                    "pairs_right": float(right[i]),
                    "right": bool(2 * right[i] > pairs[i]) if pairs[i] else None,
                    # An anchor has part in all comparisons of its prompt.
                    "confidence": float(np.mean(list(certain.values()))) if anchor else certain[image],
                    "rollouts": by_image[name, image],
                }
            )
        yield from sorted(found, key=lambda row: (row["predicted_rank"], row["image_id"]))


def shown_rollout(row: Mapping[str, Any], answers: tuple[int, ...]) -> dict[str, Any]:
    """GALLERY_ROLLOUT of a recorded rollout; its `soft` is the candidate's score in either presentation order."""
    logits = np.asarray(row["answer_logprobs"], dtype=np.float64)
    weights = np.exp(logits - logits.max())
    soft = expected_answer(logits, answers)
    second = row["candidate_second"]
    return {
        "k": row["k"],
        "text": row["text"],
        "answer_probabilities": (weights / weights.sum()).tolist(),
        "soft": float(soft if second is None else candidate_probability(soft, second)),
        "sampled_answer": row["sampled_answer"],
        "forced": row["forced"],
        "second": second,
    }


def confidence(rollouts: list[dict[str, Any]]) -> float:
    """How concentrated the answers to an image are: 1 - H(p) / log A, in [0, 1].

    p is the mean over the rollouts (GALLERY_ROLLOUT) of the probabilities of the A answers, H its entropy in nats. 1 is
    always the same answer with certainty; 0 is every answer equally likely, in one rollout or over all of them. Of a
    pair whose candidate is shown first, the probabilities are turned round, so that both orders speak of the candidate.
    """
    turned = [r["answer_probabilities"][:: -1 if r["second"] is False else 1] for r in rollouts]
    p = np.mean(turned, axis=0)
    entropy = -float(np.sum(p[p > 0] * np.log(p[p > 0])))
    return min(1.0, max(0.0, 1 - entropy / math.log(len(p))))


def judged_pairs(scores: np.ndarray, ranks: list[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """For each of N images: number of strict human pairs with it, and how many of these the scores order right.

    Args:
        scores: (N,), higher is better; a tie counts half.
        ranks: (N,), lower is better; None: there is no human order, so no pair.
    """
    pairs, right = np.zeros(len(scores)), np.zeros(len(scores))
    if ranks is not None:
        better, worse = strict_pairs(ranks)
        credits = credit(pair_outcomes(scores, better, worse), "half", "wrong")
        for side in (better, worse):
            np.add.at(pairs, side, 1)
            np.add.at(right, side, credits)
    return pairs, right


def encoded(picture: Image.Image) -> tuple[bytes, tuple[int, int]]:
    """WebP of a picture with its width and height, scaled down to LONGEST_SIDE; without loss where it is no larger."""
    small = picture.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    small.save(file, "WEBP", lossless=small.size == picture.size, quality=85)
    return file.getvalue(), small.size
