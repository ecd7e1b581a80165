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
        provenance=f"{RESULTS}/policies/{{track}}/seed{{seed}}/adapter_model.safetensors.provenance.json",
    log:
        f"{RESULTS}/logs/train_grpo/{{track}}-seed{{seed}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/train_grpo/{{track}}-seed{{seed}}.tsv"
    priority: 10  # the longest jobs start before the zero-shot rollouts, which fill the cores beside them
    conda:
        "../envs/softpref.yaml"
    threads: configuration.numeric_threads * configuration.distributed.processes
    resources:
        **jobs.job_resources(configuration, "train_grpo"),
    params:
        config=lambda w: stages.TrainGrpo.of(
            configuration, w.track, int(w.seed)
        ).canonical(),
        code=code_digest("train_grpo", "transformers"),
    shell:
        f"{jobs.launcher(configuration, 'train_grpo')} -m workflow_scripts.stages.train_grpo"
        " --base {input.base} --train {input.train}"
        " --train_images {input.train_images} --validation {input.validation}"
        " --validation_images {input.validation_images} --adapter {output.adapter}"
        " --adapter_config {output.adapter_config} --record {output.record}"
        f" --checkpoints {RESULTS}/checkpoints"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"
