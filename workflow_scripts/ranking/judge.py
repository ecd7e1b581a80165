"""A trained policy as a judge of images in memory: scores, ranks and the reasoning behind them.

    from workflow_scripts.ranking.judge import Judge
    judge = Judge.load("results/policies/imagereward/seed0", k=3)
    scores = judge.score(prompts, images)

An image is known by its pixels and a prompt by its text, and what is asked together is put in an order of its own. So
the order in which images are given changes nothing, and the same images, seed and k have the same scores in every run.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.stats import rankdata

from workflow_scripts.configuration.model import Protocol, Sampling
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.files.digests import digest
from workflow_scripts.policy.loading import Policy, load_policy
from workflow_scripts.policy.manifest import ADAPTER, PolicyError, check_trained_on
from workflow_scripts.policy.prompts import CLOSE_THINKING, OPEN_THINKING
from workflow_scripts.preferences.images import UnreadableImageError, decoded, in_memory
from workflow_scripts.rollouts.context import too_long
from workflow_scripts.rollouts.items import Item, anchor_items, pointwise_items
from workflow_scripts.rollouts.transformers_engine import generate
from workflow_scripts.running.code_digest import code_digest
from workflow_scripts.running.provenance import sidecar_path, verify
from workflow_scripts.scoring.anchor_ranking import ANCHOR_SCORE
from workflow_scripts.scoring.image_scores import image_scores, rollout_scores
from workflow_scripts.scoring.mean_at_k import subset_means
from workflow_scripts.training.sampling import as_in_training

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


class JudgeError(RuntimeError):
    """Images cannot be judged as asked: says which and what to do."""


@dataclass(frozen=True)
class Thought:
    """One rollout: what the policy thought of an image, and the score of this rollout alone."""

    reasoning: str
    score: float
    """Expected rating, or probability that the image is preferred over the anchor."""
    answer: int | None
    """The sampled answer as it was said: a rating, or for pairs 1 where the second image shown is preferred."""
    shown: str | None
    """For pairs: "first" or "second", the place at which this image was shown beside the anchor."""
    forced: bool
    """Whether the thinking was closed by the engine, its budget used up."""


@dataclass(frozen=True)
class Judgement:
    """What the policy says of one image, over k rollouts."""

    score: float
    """Mean of the soft scores of the rollouts: an expected rating of 1 to 7, or for pairs a probability."""
    standard_error: float | None
    """Of the score, over rollouts; none for a single one, and for the anchor of a comparison."""
    distribution: dict[str, float]
    """Mean probability of each answer; for pairs 1 is "preferred over the anchor". Empty for the anchor."""
    forced_share: float | None
    """Share of the rollouts that were closed by the engine; none for the anchor."""
    thoughts: list[Thought]
    """The rollouts; none for the anchor, which the others are compared with."""


@dataclass(frozen=True)
class RankedImage:
    """An image in its place among those of its prompt."""

    rank: int
    """1 is the best; equal scores share a rank."""
    index: int
    """Place in the list that was given."""
    judgement: Judgement

    @property
    def score(self) -> float:
        """Score of the image."""
        return self.judgement.score


ANCHOR = Judgement(ANCHOR_SCORE, None, {}, None, [])
Names = tuple[str, str]  # of a prompt and of one of its images


@dataclass(frozen=True)
class Judge:
    """A policy that can be asked for scores. Make it with `Judge.load`."""

    policy: Policy
    protocol: Protocol
    sampling: Sampling
    identity: str
    """Digest of policy, question, image size and sampling: other answers are another judge's."""
    k: int
    both_orders: bool
    seed: int
    batch: int

    @classmethod
    def load(
        cls,
        folder: str | Path,
        k: int = 3,
        *,
        both_orders: bool = False,
        seed: int = 0,
        batch: int = 16,
        zero_shot: bool = False,
        base: str | Path | None = None,
        device: str | None = None,
    ) -> Self:
        """Load the policy of an adapter's folder, to be asked as it was in training: question, image size, sampling.

        Args:
            folder: what a training has written, such as results/policies/imagereward/seed0. The manifest of its base
                policy is found two folders up, in base/.
            k: rollouts of each question, whose mean is the score.
            both_orders: show every pair both ways and average; twice the work. Of no effect on single images.
            seed: of sampling, and for pairs of the anchor and of the order shown.
            batch: questions that pass through the model together. Another number is another result.
            zero_shot: leave the adapter out; the base policy answers.
            base: folder that holds the files of the base policy now, where it is not where it was.
            device: "cpu" or "cuda" where it is not that of the training.

        Raises:
            JudgeError: k or batch is less than 1.
            PolicyError: the adapter was trained on another base policy, or one of the two cannot be loaded.
            ProvenanceError: a file is not what its stage wrote, or has no sidecar.
        """
        if k < 1 or batch < 1:
            raise JudgeError(f"k is {k} and batch is {batch}; both must be 1 or more")
        folder = Path(folder)
        manifest = folder.parent.parent / "base" / "manifest.json"
        if not (folder / ADAPTER).is_file():
            raise PolicyError(
                f"{folder} holds no {ADAPTER}; name the folder of a finished training, such as "
                "results/policies/imagereward/seed0"
            )
        trained = verify(folder / ADAPTER)
        sha256 = check_trained_on(folder, trained, manifest, verify(manifest))
        model = ModelConfig.model_validate(trained["config"]["model"] | ({"device": device} if device else {}))
        training = trained["config"]["training"]
        sampling = as_in_training(training["temperature"], training["max_completion_tokens"])
        with _manifest_of(manifest, base) as found:
            policy = load_policy(found, None if zero_shot else folder, model)
        weights = None if zero_shot else trained["outputs"][ADAPTER]["sha256"]
        identity = json.dumps([sha256, weights, model.model_dump(mode="json"), sampling.model_dump()], sort_keys=True)
        return cls(policy, model.protocol, sampling, digest(identity), k, both_orders, seed, batch)

    def score(
        self, prompts: Sequence[str], images: Sequence[Image.Image], *, k: int | None = None, seed: int | None = None
    ) -> NDArray[np.float64]:
        """Score images, each for its prompt; higher is better.

        A pointwise policy rates each image by itself. A pairwise policy compares the images of one prompt with an
        anchor drawn from them, whose score is 0.5: give it two or more different images of each prompt, and compare
        scores within a prompt only.

        Args:
            prompts: n texts; a prompt with several images stands there once for each.
            images: n images of any size and mode.
            k: rollouts of each question, instead of the judge's.
            seed: instead of the judge's.

        Returns:
            (n,) float64: expected ratings of 1 to 7, or probabilities.

        Raises:
            JudgeError: the lists differ in length, an image cannot be shown, a prompt is too long, or has a single
                image and the policy is pairwise.
        """
        judged = self._asked(k, seed)._judged(prompts, images)
        return np.array([judgement.score for judgement in judged], dtype=np.float64)

    def rank(
        self, prompt: str, images: Sequence[Image.Image], *, k: int | None = None, seed: int | None = None
    ) -> list[RankedImage]:
        """Rank the images of one prompt, the best first, with the reasoning of every rollout.

        Scores are those of `score`; of images with equal scores the one given earlier comes first.

        Raises:
            JudgeError: as `score`.
        """
        judged = self._asked(k, seed)._judged([prompt] * len(images), images)
        ranks = ranks_of([judgement.score for judgement in judged])
        rows = [RankedImage(ranks[i], i, judgement) for i, judgement in enumerate(judged)]
        return sorted(rows, key=lambda row: (row.rank, row.index))

    @property
    def settings(self) -> str:
        """Digest of all that decides about an answer but images and prompts."""
        asked = [self.identity, self.k, self.both_orders, self.seed, self.batch]
        return digest(json.dumps([*asked, code_digest("rank_own_images", "transformers")]))

    def chunks(self, prompts: Mapping[str, Mapping[str, int]]) -> list[list[Item]]:
        """Questions about images, in the parts that are asked together.

        Args:
            prompts: for each prompt's text the pixels of each image, by the image's name.

        Returns:
            Parts of `batch` questions, images of a size together; both orders of a pair are in one part.
        """
        rows = [
            {"prompt_id": digest(text), "prompt": text, "image_ids": sorted(pixels)} for text, pixels in prompts.items()
        ]
        readable = {name for pixels in prompts.values() for name in pixels}
        twice = self.protocol == "pairwise" and self.both_orders
        if self.protocol == "pointwise":
            items = pointwise_items(rows, readable)
        else:
            items = anchor_items(rows, readable, self.seed, self.both_orders)
        size = {item: sum(prompts[item.prompt][name] for name in item.image_ids) for item in items}
        items.sort(key=lambda item: (size[item], item.prompt_id, item.candidate, item.item_id))
        length = max(2, self.batch - self.batch % 2) if twice else self.batch
        return [items[start : start + length] for start in range(0, len(items), length)]

    def answers(self, chunk: list[Item], images: dict[str, Image.Image]) -> dict[Names, Judgement]:
        """Ask the questions of one part.

        Args:
            chunk: as `chunks` makes it.
            images: RGB images by name, those of the part at least.

        Returns:
            Judgement of each image, the anchors among them, by (id of the prompt, name of the image). Images whose
            question is longer than the policy's context are not in it.
        """
        shown = in_memory({name: images[name] for item in chunk for name in item.image_ids})
        long = too_long(self.policy, chunk, shown.sizes, self.sampling)
        asked = [item for item in chunk if item not in long]
        if not asked:
            return {}
        with contextlib.redirect_stderr(io.StringIO()):  # the engine's bar, which would show this one batch
            rollouts = list(
                generate(
                    self.policy,
                    asked,
                    shown,
                    rollouts=self.k,
                    first_k=0,
                    sampling=self.sampling,
                    batch_items=len(asked),
                    seed=f"judge {self.seed} {digest(' '.join(item.item_id for item in asked))}",
                )
            )
        return judgements(rollouts, self.policy.answers)

    def _asked(self, k: int | None, seed: int | None) -> Self:
        """This judge with other settings for one call."""
        if k is not None and k < 1:
            raise JudgeError(f"k is {k}; it must be 1 or more")
        return dataclasses.replace(self, k=self.k if k is None else k, seed=self.seed if seed is None else seed)

    def _judged(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Judgement]:
        if len(prompts) != len(images):
            raise JudgeError(f"{len(prompts)} prompts and {len(images)} images; give one prompt for each image")
        shown, names = {}, []
        groups: dict[str, dict[str, int]] = {}
        for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            try:
                pixels = as_shown(image)
            except UnreadableImageError as error:
                raise JudgeError(f"image {index} cannot be shown to the policy: {error}") from None
            names.append(image_name(pixels))
            shown[names[-1]] = pixels
            groups.setdefault(prompt, {})[names[-1]] = pixels.width * pixels.height
        if self.protocol == "pairwise" and (alone := [text for text, found in groups.items() if len(found) < 2]):
            raise JudgeError(
                f"the policy compares images, and the prompt {alone[0]!r} has one (or equal ones); give two or more "
                "different images of each prompt, or use a pointwise policy"
            )
        found: dict[Names, Judgement] = {}
        for chunk in self.chunks(groups):
            found |= self.answers(chunk, shown)
        keys = [(digest(prompt), name) for prompt, name in zip(prompts, names, strict=True)]
        if missing := [index for index, key in enumerate(keys) if key not in found]:
            raise JudgeError(
                f"the question with the prompt of image {missing[0]} is longer than the policy's context; shorten it"
            )
        return [found[key] for key in keys]


def judgements(rollouts: list[dict[str, Any]], answers: tuple[int, ...]) -> dict[Names, Judgement]:
    """Judgement of each image, from rows of `rollouts.record.ROLLOUT`; anchors of pairs are among them."""
    scored = rollout_scores(pd.DataFrame(rollouts), answers)
    frame = image_scores(scored)
    behind: dict[Names, list[dict[str, Any]]] = {}
    for row, probabilities, soft in zip(rollouts, scored["probabilities"], scored["soft"], strict=True):
        row = row | {"probabilities": probabilities, "soft": soft}
        behind.setdefault((row["prompt_id"], row["candidate"]), []).append(row)
    found = {}
    for (prompt, image), group in frame.groupby(["prompt_id", "image_id"], sort=False):
        name = (str(prompt), str(image))
        if name not in behind:
            found[name] = ANCHOR
            continue
        soft = group["soft"].to_numpy()
        score = float(subset_means(soft[None], len(soft))[0, 0])
        error = float(soft.std(ddof=1) / np.sqrt(len(soft))) if len(soft) > 1 else None
        mean = np.mean([row["probabilities"] for row in behind[name]], axis=0)
        distribution = {str(answer): float(p) for answer, p in zip(answers, mean, strict=True)}
        thoughts = [_thought(row) for row in behind[name]]
        found[name] = Judgement(score, error, distribution, float(group["forced"].mean()), thoughts)
    return found


def _thought(row: dict[str, Any]) -> Thought:
    reasoning = row["text"].partition(CLOSE_THINKING)[0].removeprefix(OPEN_THINKING).strip()
    shown = None if row["anchor"] is None else ("second" if row["candidate_second"] else "first")
    return Thought(reasoning, row["soft"], row["sampled_answer"], shown, row["forced"])


def ranks_of(scores: Sequence[float]) -> list[int]:
    """Rank of each score, 1 for the highest; equal scores share the smallest rank that they have together."""
    return [int(rank) for rank in rankdata(-np.asarray(scores, dtype=np.float64), method="min")]


def as_shown(image: Image.Image) -> Image.Image:
    """An image in memory as the policy is shown it: the way of a file, so that there is one way (`images.decoded`).

    Raises:
        UnreadableImageError: its pixels have no stated range, or its shape is none that the policy is shown.
    """
    upright = ImageOps.exif_transpose(image)
    file = io.BytesIO()
    try:
        if upright.mode in PNG_MODES:
            upright.save(file, "PNG", compress_level=0)
        else:
            upright.save(file, "TIFF")
    except (OSError, ValueError, KeyError, SystemError) as error:
        raise UnreadableImageError(f"{image.width} x {image.height} pixels of mode {image.mode}: {error}") from None
    return decoded(file.getvalue())


def image_name(image: Image.Image) -> str:
    """Name of an RGB image: a digest of its pixels and size."""
    return hashlib.sha256(f"{image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()[:16]


@contextlib.contextmanager
def _manifest_of(manifest: Path, base: str | Path | None) -> Iterator[Path]:
    """The manifest, or one that names another folder with the same files."""
    if base is None:
        yield manifest
        return
    recorded = json.loads(manifest.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        moved = Path(folder) / manifest.name
        moved.write_text(json.dumps(recorded | {"path": str(Path(base).resolve())}), encoding="utf-8")
        yield moved


def trained_policies(folder: Path) -> list[Path]:
    """Folders of the finished trainings in a results folder, the newest last."""
    found: Iterable[Path] = (
        path for path in folder.glob(f"policies/*/seed*/{ADAPTER}") if sidecar_path(path).is_file()
    )
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime)]
