"""Draw examples/own_data/: a small data set in the form in which you would bring your own.

python examples/draw_own_data.py    # from the repository's folder, with its environment

Prompts, pictures and judgements are those of the synthetic world, so that the bundled policy can look at them.
"""

import csv
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workflow_scripts.policy.cold_start import rating
from workflow_scripts.preferences.synthetic_scenes import HUMAN, draw, sample_prompt, sample_scene

FOLDER = Path(__file__).resolve().parent / "own_data"
PROMPTS, IMAGES = 18, 3


def main() -> None:
    """Write pictures, ratings.csv and pairs.jsonl."""
    rng = random.Random("own data")
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    ratings, pairs = [], []
    for number in range(PROMPTS):
        asked, background = sample_prompt(rng, test=False)
        scenes = [sample_scene(rng, asked, background) for _ in range(IMAGES)]
        names = [f"images/{number:02d}-{i}.webp" for i in range(IMAGES)]
        split = "test" if number % 3 == 2 else "validation" if number % 6 == 1 else "train"
        utilities = [HUMAN.utility(scene) + rng.gauss(0, 0.3) for scene in scenes]
        for scene, name, utility in zip(scenes, names, utilities, strict=True):
            draw(scene).save(FOLDER / name, quality=80)
            ratings.append({"prompt": scene.prompt, "image": name, "rating": rating(utility), "split": split})
        for a, b in ((0, 1), (1, 2)):
            preferred = "b" if utilities[b] > utilities[a] else "a"
            row = {"prompt_id": f"{number:02d}", "prompt": scenes[0].prompt, "split": split}
            pairs.append(row | {"image_a": names[a], "image_b": names[b], "preferred": preferred})
    with (FOLDER / "ratings.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ratings[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(ratings)
    lines = "".join(f"{json.dumps(row)}\n" for row in pairs)
    (FOLDER / "pairs.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
