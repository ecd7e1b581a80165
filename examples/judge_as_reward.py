"""Train a small text-to-image generator with a judge as its reward: no files, only images in memory.

python -m examples.judge_as_reward results/policies/imagereward/seed0     # from the repository's folder

The generator draws two groups of shapes in a quality that it chooses; which quality is better it learns from the judge
alone, by the group-relative policy gradient that trained the judge itself. Put a diffusion model in its place.
"""

import argparse
import random

import numpy as np

from workflow_scripts.preferences.synthetic_scenes import QUALITIES, Scene, draw, sample_prompt
from workflow_scripts.ranking.judge import Judge

GROUP, PROMPTS, LEARNING_RATE = 4, 4, 1.0


def main() -> None:
    """Train, and print the mean score and what the generator has come to prefer."""
    parser = argparse.ArgumentParser(description="Train a small text-to-image generator with a judge as its reward.")
    parser.add_argument("policy", help="folder of a pointwise adapter")
    parser.add_argument("--steps", type=int, default=10, help="updates (default: %(default)s)")
    arguments = parser.parse_args()
    judge = Judge.load(arguments.policy, k=1, batch=GROUP * PROMPTS)

    preference = np.zeros(len(QUALITIES))  # logits of the generator
    rng, numbers = random.Random(0), np.random.default_rng(0)
    for step in range(arguments.steps):
        probabilities = np.exp(preference) / np.exp(preference).sum()
        asked = [one for _ in range(PROMPTS) for one in [sample_prompt(rng, test=False)] * GROUP]
        chosen = numbers.choice(len(QUALITIES), size=len(asked), p=probabilities)
        scenes = [
            Scene(groups, groups, background, QUALITIES[quality], rng.getrandbits(32))
            for (groups, background), quality in zip(asked, chosen, strict=True)
        ]
        rewards = judge.score([scene.prompt for scene in scenes], [draw(scene) for scene in scenes], seed=step)

        advantages = (rewards.reshape(PROMPTS, GROUP) - rewards.reshape(PROMPTS, GROUP).mean(1, keepdims=True)).ravel()
        gradient = advantages @ (np.eye(len(QUALITIES))[chosen] - probabilities) / len(chosen)
        preference += LEARNING_RATE * gradient
        print(
            f"step {step}: mean score {rewards.mean():.3f}",
            dict(zip(QUALITIES, probabilities.round(2).tolist(), strict=True)),
        )


if __name__ == "__main__":
    main()
