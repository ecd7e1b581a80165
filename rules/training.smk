# GRPO with LoRA, one adapter for each track and seed.


rule train_grpo:
    input:
        base=rules.prepare_base_policy.output.manifest,
        train=f"{RESULTS}/datasets/{{track}}/train/subset.parquet",
        train_images=f"{RESULTS}/datasets/{{track}}/train/images-0000.parquet",
        validation=f"{RESULTS}/datasets/{{track}}/validation/subset.parquet",
        validation_images=f"{RESULTS}/datasets/{{track}}/validation/images-0000.parquet",
    output:
        adapter=f"{RESULTS}/policies/{{track}}/seed{{seed}}/adapter_model.safetensors",
        adapter_config=f"{RESULTS}/policies/{{track}}/seed{{seed}}/adapter_config.json",
        record=f"{RESULTS}/policies/{{track}}/seed{{seed}}/training.json",
        provenance=f"{RESULTS}/policies/{{track}}/seed{{seed}}/adapter_model.safetensors{SUFFIX}",
    log:
        f"{RESULTS}/logs/train_grpo/{{track}}-seed{{seed}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/train_grpo/{{track}}-seed{{seed}}.tsv"
    priority: 10  # the longest jobs start before the zero-shot rollouts, which fill the cores beside them
    conda:
        ENVIRONMENT
    threads: configuration.numeric_threads * configuration.distributed.processes
    resources:
        **resources_of("train_grpo"),
    params:
        **stage("train_grpo"),
    shell:
        command(
            "train_grpo",
            "base train train_images validation validation_images",
            "adapter adapter_config record",
            f"--checkpoints {shlex.quote(RESULTS)}/checkpoints",
        )
