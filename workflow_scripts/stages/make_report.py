"""Make the report: tables, figures, a gallery, settings and provenance in one HTML file that needs nothing else.

python -m workflow_scripts.stages.make_report \
    --galleries results/gallery/*/*/seed*/*.parquet --table1 results/table1.csv \
    --figures results/figures/training_curves.csv --page results/report.html --config '{"report_k": [1, 3], …}'
"""

from workflow_scripts.configuration.stages import MakeReport
from workflow_scripts.files.writing import replacing
from workflow_scripts.reporting.page import content, render
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Make the report: tables, figures, a gallery, settings and provenance in one HTML file."""

    galleries: list[Input]
    """Gallery of every policy on every test set."""
    table1: Input
    """Paper's Table 1; the other tables stand beside it."""
    figures: Input
    """Data of the first figure; the others stand beside it."""
    page: Output
    """The report."""
    config: MakeReport
    """Configuration of this stage as JSON."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    with run_stage(arguments) as run:
        filled, left_out = content(
            arguments.galleries, arguments.table1.parent, arguments.figures.parent, arguments.config, run.inputs
        )
        if left_out:
            run.warn(f"{left_out} prompts of the galleries find no room in the report; the files have them all")
        text = render(filled)
        with replacing(arguments.page) as temporary:
            temporary.write_text(text, encoding="utf-8")
        run.metrics({"gallery_prompts": len(filled["cards"]), "megabytes": len(text.encode()) / 1e6})


if __name__ == "__main__":
    main()
