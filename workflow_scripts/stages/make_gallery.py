"""Collect prompts of a test set for people to look at: their images, ranked by a policy and by humans, with thoughts.

python -m workflow_scripts.stages.make_gallery \
    --rollouts results/rollouts/imagereward/grpo/seed0/imagereward/0000-*.parquet \
    --scores results/scores/imagereward/grpo/seed0/imagereward.parquet \
    --subset results/datasets/imagereward/test/subset.parquet \
    --images results/datasets/imagereward/test/images-0000.parquet \
    --gallery results/gallery/imagereward/grpo/seed0/imagereward.parquet --config '{"track": "imagereward", …}'

The prompts are the first ones in the hash order of the test set: an unbiased sample, and the same for every policy.
Some of them become traces of this run in MLflow.
"""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from workflow_scripts.configuration.stages import MakeGallery
from workflow_scripts.files.writing import replacing
from workflow_scripts.policy.prompts import ANSWERS
from workflow_scripts.preferences.images import decoded
from workflow_scripts.preferences.schema import SUBSET, read_image_rows, read_table
from workflow_scripts.ranking.traces import log_gallery
from workflow_scripts.reporting.gallery import GALLERY, gallery_rows
from workflow_scripts.rollouts.record import read_rollouts
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.scoring.image_scores import rollout_scores
from workflow_scripts.scoring.judged_prompts import judged_prompts
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Collect prompts of a test set for people to look at."""

    rollouts: list[Input]
    """Rollout files of the first shards: all blocks."""
    scores: Input
    """Scores of the same policy on the same test set."""
    subset: Input
    """Test prompts with their annotations, in hash order."""
    images: list[Input]
    """Images of the first shards."""
    gallery: Output
    """Gallery, one row for each prompt and image."""
    config: MakeGallery
    """Configuration of this stage as JSON."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config = arguments.config
    with run_stage(arguments) as run:
        subset = read_table(arguments.subset, SUBSET).to_pylist()
        prompts = judged_prompts(
            [row for row in subset if row["position"] < config.prompts], pd.read_parquet(arguments.scores)
        )
        rollouts = read_rollouts(arguments.rollouts)
        rollouts = rollouts[rollouts["prompt_id"].isin([prompt.prompt_id for prompt in prompts])]
        scored = rollout_scores(rollouts, ANSWERS[config.protocol])
        shown = {image for prompt in prompts for image in prompt.image_ids}
        pictures = {
            row["image_id"]: decoded(row["bytes"])
            for row in read_image_rows(arguments.images)
            if row["image_id"] in shown
        }
        origin = {"dataset": config.test, "track": config.track, "policy": config.policy, "seed": config.seed}
        rows = [row | origin for row in gallery_rows(prompts, scored, pictures)]
        with replacing(arguments.gallery) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=GALLERY), temporary, compression="zstd")
        judged = [row for row in rows if row["right"] is not None]
        run.metrics(
            {
                "prompts": len({row["prompt_id"] for row in rows}),
                "images": len(rows),
                "right_share": sum(row["right"] for row in judged) / max(1, len(judged)),
                "megabytes": arguments.gallery.stat().st_size / 1e6,
            }
        )
        log_gallery(run, rows, config.traces)


if __name__ == "__main__":
    main()
