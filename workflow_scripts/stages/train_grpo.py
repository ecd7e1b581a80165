"""Train a LoRA adapter with GRPO on one track (paper §2.2 and §4), and keep the adapter that validates best or last.

python -m workflow_scripts.stages.train_grpo --base results/policies/base/manifest.json \
    --train results/datasets/imagereward/train/subset.parquet \
    --train_images results/datasets/imagereward/train/images-0000.parquet \
    --validation results/datasets/imagereward/validation/subset.parquet \
    --validation_images results/datasets/imagereward/validation/images-0000.parquet \
    --adapter results/policies/imagereward/seed0/adapter_model.safetensors \
    --adapter_config results/policies/imagereward/seed0/adapter_config.json \
    --record results/policies/imagereward/seed0/training.json \
    --checkpoints results/checkpoints --config '{"track": "imagereward", "seed": 0, "model": {…}, "training": {…}}'

After a kill, the training resumes from its last complete checkpoint in `<checkpoints>/<stage_key>`.

With `distributed` in the configuration, torchrun starts the stage once in each process:
torchrun --standalone --nproc-per-node 2 -m workflow_scripts.stages.train_grpo …
"""

import json
import shutil
from pathlib import Path

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.files.redaction import redacted
from workflow_scripts.files.writing import replacing, write_json
from workflow_scripts.policy.loading import as_policy, check_adapted_layers, load_model, load_processor
from workflow_scripts.policy.manifest import ADAPTER, ADAPTER_CONFIG, base_path
from workflow_scripts.preferences.schema import SchemaError
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage
from workflow_scripts.training.assembly import grpo_trainer
from workflow_scripts.training.checkpoints import STATE, last_complete_checkpoint, step_of
from workflow_scripts.training.epochs import optimizer_steps
from workflow_scripts.training.generation import check_generation, served_folder
from workflow_scripts.training.items import Split
from workflow_scripts.training.record import trained_on, training_record
from workflow_scripts.training.sampling import as_in_training
from workflow_scripts.training.settings import check_processes, grpo_config, processes_of
from workflow_scripts.training.trainer import Curves, ValidatingTrainer
from workflow_scripts.training.validation import Validation


class Arguments(StageArguments):
    """Train a LoRA adapter with GRPO on one track."""

    base: Input
    """Manifest of the base policy."""
    train: Input
    """Training prompts with their annotations."""
    train_images: Input
    """Their images."""
    validation: Input
    """Validation prompts with their annotations."""
    validation_images: Input
    """Their images."""
    adapter: Output
    """Weights of the adapter that is kept."""
    adapter_config: Output
    """Its configuration."""
    record: Output
    """Record of the training: items seen, curves, validations with their errors and answer histograms, kept step,
    collapse, warnings."""
    checkpoints: Path
    """Folder of resume states."""
    config: TrainGrpo
    """Configuration of this stage as JSON."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config, t = arguments.config, arguments.config.training
    with run_stage(arguments) as run:
        warnings: list[str] = []

        def warn(message: str) -> None:
            run.warn(message)
            warnings.append(redacted(message))

        folder = arguments.checkpoints / run.stage_key
        folder.mkdir(parents=True, exist_ok=True)
        check_generation(config)
        checkpoint = last_complete_checkpoint(folder, processes_of(config))
        settings = grpo_config(config, folder, resumed=checkpoint is not None)
        check_processes(config, settings)
        cache = folder / "images"
        train = Split.read("train", arguments.train, arguments.train_images, cache)
        validation = Split.read("validation", arguments.validation, arguments.validation_images, cache)
        processor, model = load_processor(arguments.base, config.model), load_model(arguments.base, config.model)
        check_adapted_layers(model, t.lora.target_modules)
        if t.generation == "vllm_colocate":
            with settings.main_process_first():
                served = served_folder(base_path(arguments.base), model, processor, folder / "served")
            model.name_or_path = str(served)

        policy = as_policy(model, processor, config.model)
        sampling = as_in_training(t.temperature, t.max_completion_tokens)
        items = train.items(config, policy, sampling, warn)
        validation_items = validation.items(config, policy, sampling, warn)
        run.metrics({"training_items": len(items), "validation_items": len(validation_items)})
        settings.max_steps = steps = optimizer_steps(t, len(items))

        curves = Curves(run.metrics)
        validate = Validation(config, policy, validation, validation_items, sampling, settings.process_index)
        trainer = grpo_trainer(ValidatingTrainer, settings, items, train.images, validate, callbacks=[curves])
        if checkpoint and (state := TrainerState.load_from_json(str(checkpoint / STATE))).global_step >= steps:
            trainer.state = state  # `train` would do one step more, however many are done
            curves.on_train_begin(settings, state, trainer.control)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if not trainer.is_world_process_zero():
            return

        if trainer.state.best_model_checkpoint is None:
            raise SchemaError(
                f"{arguments.validation}: no validation pair could be judged (all tied, or no image readable); "
                "raise validation_prompts"
            )
        best = folder / Path(trainer.state.best_model_checkpoint).name
        kept = best if t.keep == "best" else folder / f"{PREFIX_CHECKPOINT_DIR}-{steps}"
        with replacing(arguments.adapter) as temporary:
            shutil.copyfile(kept / ADAPTER, temporary)
        adapter_config = json.loads((kept / ADAPTER_CONFIG).read_text())
        adapter_config["base_model_name_or_path"] = json.loads(arguments.base.read_text())["path"]
        write_json(arguments.adapter_config, adapter_config)
        seen = trained_on(t, steps, len(items), config.seed)
        record = training_record(config, trainer.state.log_history, step_of(kept), warn)
        write_json(arguments.record, record | seen | {"warnings": warnings})
        said = ("kept_step", "kept_soft_pair_accuracy", "selection_se", "collapsed")
        run.metrics(seen | {name: record[name] for name in said})
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
