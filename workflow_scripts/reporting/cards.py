"""Cards of the report: prompts of the galleries with their images, as many as one page holds."""

import base64
import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from workflow_scripts.policy.prompts import CLOSE_THINKING, OPEN_THINKING
from workflow_scripts.preferences.schema import read_table
from workflow_scripts.reporting.gallery import GALLERY
from workflow_scripts.reporting.wording import POLICIES

LARGEST_GALLERY = 9_000_000  # characters that pictures and texts of the gallery may take in the page
MISTAKES = 8  # listed above the gallery


class Gallery:
    """Cards of all galleries, as many as the page may hold, and their pictures, each once."""

    def __init__(self, paths: list[Path], names: dict[str, dict[str, str]]) -> None:
        """Read the galleries in turn, prompt by prompt, so that all are cut alike where the page is full."""
        self.cards: list[dict[str, Any]] = []
        self.pictures: dict[str, str] = {}
        self.left_out = 0
        queues = []
        for path in paths:
            prompts = defaultdict(list)
            for row in read_table(path, GALLERY).to_pylist():
                prompts[row["prompt_id"]].append(row)
            queues.append(list(prompts.values()))
        size = 0
        for turn in range(max(map(len, queues))):
            for rows in (queue[turn] for queue in queues if turn < len(queue)):
                pictures = {hashlib.sha256(r["image"]).hexdigest()[:12]: data_uri(r["image"]) for r in rows}
                size += sum(len(uri) for name, uri in pictures.items() if name not in self.pictures)
                size += sum(1500 + len(rollout["text"]) for row in rows for rollout in row["rollouts"])
                if size > LARGEST_GALLERY:
                    self.left_out += 1
                    continue
                self.pictures |= pictures
                self.cards.append(card(rows, len(self.cards), names))
        # Thirds by training set, since the confidence of ratings and that of pairs have different scales.
        for track in {c["track"] for c in self.cards}:
            own = [c for c in self.cards if c["track"] == track]
            low, high = np.quantile([c["confidence"] for c in own], [1 / 3, 2 / 3])
            for c in own:
                c["level"] = "low" if c["confidence"] <= low else "high" if c["confidence"] > high else "middle"

    def mistakes(self) -> list[dict[str, Any]]:
        """Prompts that are mostly wrong, the most confident first."""
        wrong = [c for c in self.cards if c["outcome"] == "wrong"]
        return sorted(wrong, key=lambda c: (c["level"] != "high", -c["confidence"]))[:MISTAKES]

    def filters(self, names: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
        """Filters with their choices; one with a single choice is left out, but for the first four."""
        titles = {
            "outcome": ("agreement with people", {"all": "every pair right", "most": "most pairs right"}),
            "confidence": ("confidence", {"low": "lowest third", "middle": "middle third", "high": "highest third"}),
            "test": ("test set", names["test"]),
            "policy": ("policy", POLICIES),
            "track": ("trained on", names["track"]),
            "seed": ("seed", {}),
        }
        titles["outcome"][1]["wrong"] = "half or more pairs wrong"
        found = []
        for name, (title, words) in titles.items():
            values = {str(c["level" if name == "confidence" else name]) for c in self.cards}
            ordered = [name for name in words if name in values] + sorted(values - words.keys())
            if len(values) > 1 or name in ("outcome", "confidence", "test", "policy"):
                found.append({"name": name, "title": title, "choices": [(v, words.get(v, v)) for v in ordered]})
        return found


def data_uri(image: bytes) -> str:
    """A picture of a gallery as a data URI."""
    kind = "png" if image.startswith(b"\x89PNG") else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def card(rows: list[dict[str, Any]], number: int, names: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Template variables of one prompt with its images, ranked by one policy."""
    first = rows[0]
    judged = [row for row in rows if row["rollouts"]]
    pairs, right = sum(row["pairs"] for row in rows), sum(row["pairs_right"] for row in rows)
    images = []
    for row in rows:
        picture = hashlib.sha256(row["image"]).hexdigest()[:12]
        human = "no rank" if row["human_rank"] is None else f"#{row['human_rank']:.0f}"
        if row["human_rating"] is not None:
            human += f" (rated {row['human_rating']:.0f})"
        error = "" if row["score_se"] is None else f" ± {row['score_se']:.2f}"
        images.append(
            {
                **{key: row[key] for key in ("width", "height", "right", "human_rank", "predicted_rank", "image_id")},
                "picture": picture,
                "predicted": f"#{row['predicted_rank']}",
                "human": human,
                "score": f"{row['score']:.2f}{error}",
                "alt": f"{first['prompt']}: rank #{row['predicted_rank']} of {len(rows)} by policy, {human} by people",
                "people_alt": f"{first['prompt']}: rank {human} by people",
                "bars": bars(row),
                "rollouts": [thought(rollout) for rollout in row["rollouts"]],
            }
        )
    ranked = [image for image in images if image["human_rank"] is not None]
    outcome = "unranked" if not pairs else "all" if right == pairs else "most" if 2 * right > pairs else "wrong"
    return {
        **{key: first[key] for key in ("prompt", "track", "policy", "seed", "k")},
        "id": f"prompt-{number + 1}",
        "test": first["dataset"],
        "policy_name": f"{POLICIES[first['policy']]}, {names['track'][first['track']]}, seed {first['seed']}",
        "test_name": f"test set {names['test'][first['dataset']]}",
        # Both images of a pair count it.
        "agreement": f"{right / 2:g} of {pairs // 2} pairs right" if pairs else "no ranked pair",
        "outcome": outcome,
        "confidence": float(np.mean([row["confidence"] for row in judged or rows])),
        "images": sorted(images, key=lambda image: (image["predicted_rank"], image["image_id"])),
        "people": sorted(ranked, key=lambda image: (image["human_rank"], image["image_id"])),
    }


def bars(row: dict[str, Any]) -> list[tuple[str, float]]:
    """Name and mean share in % of each answer about an image; nothing for an anchor."""
    if row["distribution"] is None:
        return []
    shares = 100 * np.array(row["distribution"])
    names = map(str, range(1, len(shares) + 1)) if row["rollouts"][0]["second"] is None else ["anchor", "this one"]
    return list(zip(names, shares.tolist(), strict=True))


def thought(rollout: dict[str, Any]) -> dict[str, str]:
    """Reasoning of a rollout, and a line on its answer."""
    thinking = rollout["text"].partition(CLOSE_THINKING)[0].strip().removeprefix(OPEN_THINKING).strip()
    answer = rollout["sampled_answer"]
    if rollout["second"] is None:
        said = "no valid answer" if answer is None else f"answer {answer}"
    else:
        place = "second" if rollout["second"] else "first"
        preferred = "no valid answer" if answer is None else f"prefers the {('first', 'second')[answer]}"
        said = f"shown {place}; {preferred}"
    forced = "; thinking cut off" if rollout["forced"] else ""
    return {"thinking": thinking, "said": f"Rollout {rollout['k'] + 1}: {said}; score {rollout['soft']:.2f}{forced}"}
