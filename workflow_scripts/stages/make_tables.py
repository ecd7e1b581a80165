"""Make the paper's tables from measured accuracies: table1, table2, the comparisons behind them, and sensitivity.

python -m workflow_scripts.stages.make_tables --accuracies results/accuracy/*/*/seed*/*.json \
    --base results/policies/base/manifest.json \
    --adapters results/policies/imagereward/seed0/adapter_model.safetensors --table1 results/table1.csv \
    --table2 results/table2.csv --comparisons results/comparisons.csv --sensitivity results/sensitivity.csv \
    --markdown results/tables.md --config '{"tracks": ["imagereward"], "seeds": [0], …}'
"""

import json
from pathlib import Path

from pydantic import Field

from workflow_scripts.configuration.stages import MakeTables
from workflow_scripts.files.writing import replacing
from workflow_scripts.reporting.tables import Measured, comparisons, markdown, sensitivity, table1, table2
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Make the paper's tables from measured accuracies."""

    accuracies: list[Input]
    """Accuracy files of every policy, test set and seed; their per-prompt files stand beside them."""
    base: Input
    """Manifest of the base policy."""
    adapters: list[Input] = Field([])
    """Adapters of the trained policies; their training records stand beside them."""
    table1: Output
    """Paper's Table 1."""
    table2: Output
    """Paper's Table 2."""
    comparisons: Output
    """Every claimed improvement with its paired interval."""
    sensitivity: Output
    """The same accuracies under every rule."""
    markdown: Output
    """The tables for people."""
    config: MakeTables
    """Configuration of this stage as JSON."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config = arguments.config
    with run_stage(arguments) as run:
        manifest = json.loads(arguments.base.read_text(encoding="utf-8"))
        trainings = {}
        for path in arguments.adapters:
            trained = run.inputs[str(path)]["config"]
            record = json.loads(path.with_name("training.json").read_text(encoding="utf-8"))
            trainings[trained["track"], trained["seed"]] = record
        parts = [manifest, *([manifest["adapter"]] if "adapter" in manifest else [])]
        model = " + ".join(part["repository"] or Path(part["path"]).name for part in parts)
        measured = Measured(arguments.accuracies, config, model, trainings)

        one, two, compared = table1(measured), table2(measured), comparisons(measured)
        outputs = {
            arguments.table1: one,
            arguments.table2: two,
            arguments.comparisons: compared,
            arguments.sensitivity: sensitivity(measured),
        }
        for path, frame in outputs.items():
            with replacing(path) as temporary:
                frame.to_csv(temporary, index=False, lineterminator="\n")
        with replacing(arguments.markdown) as temporary:
            temporary.write_text(markdown(one, two, compared, config), encoding="utf-8")
        for row in one.to_dict("records"):
            name = f"table1/{row['training_data']}/{row['test_data']}/{row['against']}/seed {row['seed']}"
            run.metrics({f"{name}/Mean_at_{k}": row[f"mean@{k}"] for k in config.report_k})
        run.metrics({"claims": len(compared), "claims_that_hold": int(compared["holds"].sum())})


if __name__ == "__main__":
    main()
