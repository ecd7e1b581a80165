"""Where scores meet the annotations: the prompts of a test set that were judged, with the scores of their images."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

METHODS = ("soft", "hard")  # columns of scores


class JudgedPrompt(NamedTuple):
    """A test prompt with its N judged images, in the order of the test set."""

    prompt_id: str
    prompt: str
    image_ids: list[str]
    ranks: Any
    """(N,) float64, lower is better; None in a table without ranks, which no accuracy can be measured on."""
    ratings: NDArray[np.float64] | None
    """(N,), 1 to 7."""
    annotations: NDArray[np.float64] | None
    """(annotators, N) ranks by each single annotator."""
    scores: dict[str, NDArray[np.float64]]
    """By method (N, K) scores of K rollouts, higher is better; nan where a rollout gave none."""


def judged_prompts(rows: Iterable[Mapping[str, Any]], scores: pd.DataFrame) -> list[JudgedPrompt]:
    """Join the rows of a test set with the scores of its images.

    An image without any score leaves the test, as does a prompt without such images: what could not be read or asked
    was never judged, and is no error of the policy.

    Args:
        rows: of `preferences.schema.SUBSET`.
        scores: columns prompt_id, image_id, k and the METHODS, a row for each image and k.
    """
    judged: dict[str, set[str]] = {}
    for prompt, image in scores[["prompt_id", "image_id"]].drop_duplicates().itertuples(index=False, name=None):
        judged.setdefault(prompt, set()).add(image)
    rows = [row for row in rows if row["prompt_id"] in judged]
    kept = [[i for i, name in enumerate(row["image_ids"]) if name in judged[row["prompt_id"]]] for row in rows]
    images = [[row["image_ids"][i] for i in places] for row, places in zip(rows, kept, strict=True)]
    index = [(row["prompt_id"], image) for row, names in zip(rows, images, strict=True) for image in names]
    ends = np.cumsum([len(names) for names in images])[:-1]
    matrices = {}
    for method in METHODS:
        wide = scores.pivot(index=["prompt_id", "image_id"], columns="k", values=method).sort_index(axis=1)
        matrices[method] = np.split(wide.reindex(index).to_numpy(dtype=float), ends)

    def judged_ones(number: int, column: str) -> Any:
        """A column of a row without the images that were not judged, (..., N); None where it is empty."""
        values = rows[number][column]
        return np.array(values, float)[..., kept[number]] if values else None

    return [
        JudgedPrompt(
            row["prompt_id"],
            row["prompt"],
            images[number],
            judged_ones(number, "ranks"),
            judged_ones(number, "ratings"),
            judged_ones(number, "annotations"),
            {method: by_prompt[number] for method, by_prompt in matrices.items()},
        )
        for number, row in enumerate(rows)
    ]
