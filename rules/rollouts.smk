# Rollouts on the test sets: the only place where the model runs for the tables.


rule generate_rollouts:
    input:
        base=rules.prepare_base_policy.output.manifest,
        adapter=lambda w: (
            rules.train_grpo.output.adapter.format(**w) if w.policy == "grpo" else []
        ),
        subset=f"{RESULTS}/datasets/{{test}}/test/subset.parquet",
        images=f"{RESULTS}/datasets/{{test}}/test/images-{{shard}}.parquet",
    output:
        rollouts=f"{RESULTS}/rollouts/{{track}}/{{policy}}/seed{{seed}}/{{test}}/{{shard}}-{{block}}.parquet",
        provenance=f"{RESULTS}/rollouts/{{track}}/{{policy}}/seed{{seed}}/{{test}}/{{shard}}-{{block}}.parquet.provenance.json",
    log:
        f"{RESULTS}/logs/generate_rollouts/{{track}}-{{policy}}-seed{{seed}}-{{test}}-{{shard}}-{{block}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/generate_rollouts/{{track}}-{{policy}}-seed{{seed}}-{{test}}-{{shard}}-{{block}}.tsv"
    conda:
        "../envs/softpref.yaml"
    threads: configuration.numeric_threads
    resources:
        **jobs.job_resources(configuration, "generate_rollouts"),
    params:
        config=lambda w: stages.GenerateRollouts.of(
            configuration,
            w.track,
            w.policy,
            w.test,
            int(w.seed),
            int(w.shard),
            int(w.block),
        ).canonical(),
        code=code_digest("generate_rollouts", configuration.rollouts.engine),
    shell:
        f"{jobs.launcher(configuration, 'generate_rollouts')} -m workflow_scripts.stages.generate_rollouts"
        " --base {input.base}"
        " $(test -z '{input.adapter}' || echo --adapter {input.adapter})"
        " --subset {input.subset} --images {input.images} --output {output.rollouts}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"
