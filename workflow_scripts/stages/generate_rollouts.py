"""Generate one block of rollouts for one shard of a test set. No later stage runs the model.

python -m workflow_scripts.stages.generate_rollouts --base results/policies/base/manifest.json \
    --adapter results/policies/imagereward/seed0/adapter_model.safetensors \
    --subset results/datasets/imagereward/test/subset.parquet \
    --images results/datasets/imagereward/test/images-0000.parquet \
    --rollouts results/rollouts/imagereward/grpo/seed0/imagereward/0000-0000.parquet --config '{"track": …}'

Without `--adapter` the base policy answers (zero-shot).
"""

import time

from workflow_scripts.configuration.stages import GenerateRollouts
from workflow_scripts.policy.manifest import check_trained_on
from workflow_scripts.preferences.images import Images, decoded
from workflow_scripts.preferences.schema import SUBSET, read_image_rows, read_table
from workflow_scripts.rollouts.context import within_context
from workflow_scripts.rollouts.items import anchor_items, pointwise_items
from workflow_scripts.rollouts.record import sample_texts, write_rollouts
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Generate one block of rollouts for one shard of a test set."""

    base: Input
    """Manifest of the base policy."""
    adapter: Input | None = None
    """Adapter of the trained policy; its configuration stands beside it."""
    subset: Input
    """Test prompts in hash order."""
    images: Input
    """Images of this shard."""
    rollouts: Output
    """Rollouts."""
    config: GenerateRollouts
    """Configuration of this stage as JSON."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config = arguments.config
    with run_stage(arguments) as run:
        if arguments.adapter:
            trained, base = run.inputs[str(arguments.adapter)], run.inputs[str(arguments.base)]
            check_trained_on(arguments.adapter, trained, arguments.base, base)
        rows = [
            row
            for row in read_table(arguments.subset, SUBSET).to_pylist()
            if config.start <= row["position"] < config.stop
        ]
        sizes, encoded = {}, {}
        for row in read_image_rows([arguments.images]):
            sizes[row["image_id"]], encoded[row["image_id"]] = (row["width"], row["height"]), row["bytes"]
        if config.model.protocol == "pointwise":
            items = pointwise_items(rows, set(sizes))
        else:
            items = anchor_items(rows, set(sizes), config.seed, config.both_orders)
        adapter = arguments.adapter and arguments.adapter.parent
        if config.vllm:
            from workflow_scripts.rollouts.vllm_engine import generate, load_into_vllm

            policy = load_into_vllm(arguments.base, adapter, config.model, config.vllm)
        else:
            from workflow_scripts.policy.loading import load_policy
            from workflow_scripts.rollouts.transformers_engine import generate

            policy = load_policy(arguments.base, adapter, config.model)
        items = within_context(policy, items, sizes, config.sampling, run.warn)
        started = time.perf_counter()
        rollouts = list(
            generate(
                policy,
                items,
                Images(sizes, lambda name: decoded(encoded[name])),
                rollouts=config.rollouts,
                first_k=config.block * config.rollouts,
                sampling=config.sampling,
                batch_items=config.batch_items,
                seed=f"{config.track} {config.policy} {config.test} {config.seed} {config.shard} {config.block}",
            )
        )
        write_rollouts(arguments.rollouts, rollouts)
        run.metrics(
            {
                "items": len(items),
                "rollouts": len(rollouts),
                "forced_share": sum(r["forced"] for r in rollouts) / max(1, len(rollouts)),
                "missing_answer_share": sum(r["sampled_answer"] is None for r in rollouts) / max(1, len(rollouts)),
                "rollouts_per_second": len(rollouts) / (time.perf_counter() - started),
            }
        )
        for name, text in sample_texts(rollouts).items():
            run.text(text, name)


if __name__ == "__main__":
    main()
