"""Turn recorded answer logits to scores of images (paper §3): soft, and hard from the sampled answer.

python -m workflow_scripts.stages.score_rollouts \
    --rollouts results/rollouts/imagereward/grpo/seed0/imagereward/*.parquet \
    --scores results/scores/imagereward/grpo/seed0/imagereward.parquet --config '{"track": "imagereward", …}'
"""

import pyarrow as pa
import pyarrow.parquet as pq

from workflow_scripts.configuration.stages import ScoreRollouts
from workflow_scripts.files.writing import replacing
from workflow_scripts.policy.prompts import ANSWERS
from workflow_scripts.preferences.schema import SchemaError
from workflow_scripts.rollouts.record import read_rollouts
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.scoring.image_scores import image_scores, rollout_scores
from workflow_scripts.tracking.stage_run import run_stage

SCORED = [
    *("item_id", "prompt_id", "candidate", "anchor", "candidate_second", "k", "forced", "sampled_answer"),
    "answer_logprobs",
]  # of ROLLOUT; the texts are most of a file

SCORE = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("k", pa.int32(), nullable=False),
        pa.field("soft", pa.float64(), nullable=False),
        pa.field("hard", pa.float64()),  # null: no valid sampled answer
        pa.field("forced", pa.float64()),  # share of the rollouts behind it that were forced; null: an anchor
    ]
)


class Arguments(StageArguments):
    """Turn recorded answer logits to scores of images."""

    rollouts: list[Input]
    """Rollout files: all shards and blocks of one policy on one test set."""
    scores: Output
    """Scores, one row for each image and k."""
    config: ScoreRollouts
    """Configuration of this stage as JSON."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    answers = ANSWERS[arguments.config.protocol]
    with run_stage(arguments) as run:
        rollouts = read_rollouts(arguments.rollouts, SCORED)
        if rollouts.empty:
            raise SchemaError(
                f"{arguments.rollouts[0].parent} holds no rollout: no test question fits the policy's context and has "
                "its images; see the warnings of generate_rollouts, and choose other test data or another policy"
            )
        frame = image_scores(rollout_scores(rollouts, answers)).sort_values(["prompt_id", "image_id", "k"])
        with replacing(arguments.scores) as temporary:
            pq.write_table(pa.Table.from_pandas(frame, SCORE, preserve_index=False), temporary, compression="zstd")
        run.metrics(
            {
                "rollouts": len(rollouts),
                "images": frame["image_id"].nunique(),
                "forced_share": float(rollouts["forced"].mean()),
                "missing_answer_share": float(rollouts["sampled_answer"].isna().mean()),
            }
        )


if __name__ == "__main__":
    main()
