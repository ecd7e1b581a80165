"""Draw the figures: each as SVG and PNG, with its data as CSV.

python -m workflow_scripts.stages.make_figures --rollouts results/rollouts/*/*/seed*/*/*.parquet \
    --scores results/scores/imagereward/grpo/seed0/imagereward.parquet \
    --subsets results/datasets/imagereward/test/subset.parquet \
    --adapters results/policies/imagereward/seed0/adapter_model.safetensors \
    --figures results/figures/mean_at_k.csv results/figures/mean_at_k.svg --config '{"tracks": …}'
"""

from pathlib import Path

from pydantic import Field

from workflow_scripts.configuration.stages import MakeFigures
from workflow_scripts.files.writing import replacing
from workflow_scripts.reporting import drawing
from workflow_scripts.reporting.figures import FIGURES
from workflow_scripts.reporting.policies import read_policies
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Draw the figures: each as SVG and PNG, with its data as CSV."""

    rollouts: list[Input]
    """Rollout files of every policy, test set and seed."""
    scores: list[Input]
    """Scores of the same."""
    subsets: list[Input]
    """Prompts of every test set with their annotations."""
    adapters: list[Input] = Field([])
    """Adapters of the trained policies; their training records stand beside them."""
    figures: list[Output]
    """Files to write: a figure's name with .csv, .svg or .png."""
    config: MakeFigures
    """Configuration of this stage as JSON."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    with run_stage(arguments) as run:
        policies = read_policies(
            arguments.rollouts,
            arguments.scores,
            arguments.subsets,
            arguments.adapters,
            {Path(path): sidecar["config"] for path, sidecar in run.inputs.items()},
            arguments.config,
        )
        tables = {name: plot.table(policies).reindex(columns=plot.columns) for name, plot in FIGURES.items()}
        for path in arguments.figures:
            table = tables[path.stem]
            with replacing(path) as temporary:
                if path.suffix == ".csv":
                    table.to_csv(temporary, index=False, lineterminator="\n")
                else:
                    empty = drawing.nothing("no policy of this run has data for this figure")
                    figure = empty if table.empty else FIGURES[path.stem].draw(table)
                    drawing.save(figure, temporary, path.suffix.removeprefix("."))
        pairs = tables["calibration_pairs"]
        for row in pairs.drop_duplicates(["track", "test", "policy", "rollouts"]).to_dict("records"):
            name = f"{row['track']}/{row['policy']}/{row['test']}/{row['rollouts']} rollouts"
            run.metrics({f"brier/{name}": row["brier"], f"calibration_error/{name}": row["ece"]})


if __name__ == "__main__":
    main()
