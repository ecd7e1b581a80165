"""Make the tiny base policy from scratch: a real Qwen2.5-VL, cold-started on templated reasoning.

python -m workflow_scripts.stages.cold_start_policy --model results/policies/cold_start/model.safetensors \
    --config '{"cold_start": {…}, "templates": {"pointwise": "…", "pairwise": "…"}, "numeric_threads": 1, …}'

The folder is a complete model: configuration, processor, and weights in float16, which are loaded as float32.
"""

import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from workflow_scripts.configuration.stages import ColdStartPolicy
from workflow_scripts.policy.cold_start import corpus, train
from workflow_scripts.policy.tiny_qwen import build_model, build_processor, build_tokenizer
from workflow_scripts.preferences.synthetic_scenes import SIDE
from workflow_scripts.running.command_line import Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage

CORPUS_PROMPTS = 800


class Arguments(StageArguments):
    """Make the tiny base policy from scratch."""

    model: Output
    """Weights; configuration and processor are written beside them."""
    config: ColdStartPolicy
    """Configuration of this stage as JSON."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config, c = arguments.config, arguments.config.cold_start
    with run_stage(arguments) as run:
        torch.set_num_threads(config.numeric_threads)
        templates: dict[str, str] = dict(config.templates)  # type: ignore[arg-type]
        tokenizer = build_tokenizer(corpus(templates, CORPUS_PROMPTS))
        processor = build_processor(tokenizer, SIDE)
        model = build_model(tokenizer, c.seed)
        with tqdm(total=c.caption_steps + c.trace_steps, desc="cold start", mininterval=30) as bar:

            def log(losses: dict[str, float], step: int) -> None:
                bar.update()
                if step % 50 == 0:
                    run.metrics(losses, step=step)

            train(model, processor, templates, c, log)
        run.metrics({"parameters": model.num_parameters()})
        folder = arguments.model.parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            processor.save_pretrained(temporary)
            model.half().save_pretrained(temporary)
            for path in Path(temporary).iterdir():
                path.replace(folder / path.name)


if __name__ == "__main__":
    main()
