"""Write the synthetic world in the published raw layout of ImageRewardDB or HPDv2.

python -m workflow_scripts.stages.synthesize_dataset --record results/downloads/imagereward/dataset.json \
    --config '{"dataset": "imagereward", "world": {"train_prompts": 64, "validation_prompts": 16, "test_prompts": 32}}'

The output is the record of the data set; the raw files stand beside it.
"""

from workflow_scripts.configuration.data_stages import SynthesizeDataset
from workflow_scripts.configuration.model import ImageRewardWorld
from workflow_scripts.files.records import file_record
from workflow_scripts.files.writing import write_json
from workflow_scripts.preferences.synthetic_layouts import write_hpdv2, write_imagereward
from workflow_scripts.running.command_line import Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Write the synthetic world in the published raw layout of ImageRewardDB or HPDv2."""

    record: Output
    """dataset.json: source, measured agreement of the annotators, and the digest of every raw file beside it."""
    config: SynthesizeDataset
    """Data set, its size and its seed."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    with run_stage(arguments) as run:
        folder, world = arguments.record.parent, arguments.config.world
        if isinstance(world, ImageRewardWorld):
            files, summary = write_imagereward(folder, world)
        else:
            files, summary = write_hpdv2(folder, world)
        record = {
            "dataset": arguments.config.dataset,
            "source": "synthetic",
            "revision": f"seed {world.seed}",
            "world": world.model_dump(mode="json"),
            **summary,
            "files": {name: file_record(folder / name) for name in sorted(files)},
        }
        write_json(arguments.record, record)
        run.metrics(summary["measured"])


if __name__ == "__main__":
    main()
