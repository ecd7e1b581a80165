"""Rank the images of a configured CSV or folder by a trained policy: the command `rank` as a job of the workflow.

python -m workflow_scripts.stages.rank_own_images --base results/policies/base/manifest.json \
    --adapter results/policies/imagereward/seed0/adapter_model.safetensors \
    --table results/ranking/ranking.csv --rows results/ranking/ranking.jsonl --page results/ranking/ranking.html \
    --config '{"images": "examples/own_data/images", "prompt": "two red circles", "track": "imagereward", …}'
"""

from workflow_scripts.configuration.stages import RankOwnImages
from workflow_scripts.files.paths import ROOT
from workflow_scripts.ranking.listing import listed
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Rank the images of a configured CSV or folder by a trained policy."""

    base: Input
    """Manifest of the base policy."""
    adapter: Input
    """Adapter of the trained policy; its configuration stands beside it."""
    table: Output
    """CSV: rank, score and answer distribution of each image."""
    rows: Output
    """JSON lines: the same with every thought."""
    page: Output
    """HTML: the images in their order."""
    config: RankOwnImages
    """Configuration of this stage as JSON."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config = arguments.config
    with run_stage(arguments) as run:
        from workflow_scripts.ranking.judge import Judge
        from workflow_scripts.ranking.ranked_files import Outputs, rank_files

        judge = Judge.load(
            arguments.adapter.parent, config.k, both_orders=config.both_orders, seed=config.seed, batch=config.batch
        )
        counts = rank_files(
            judge, listed(ROOT / config.images, config.prompt), Outputs(arguments.table, arguments.rows, arguments.page)
        )
        if counts["without_score"]:
            run.warn(
                f"{counts['without_score']} of {counts['images']} images have no score; the column `problem` of "
                f"{arguments.table} says why"
            )
        run.metrics(counts)


if __name__ == "__main__":
    main()
