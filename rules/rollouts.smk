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
        provenance=f"{RESULTS}/rollouts/{{track}}/{{policy}}/seed{{seed}}/{{test}}/{{shard}}-{{block}}.parquet{SUFFIX}",
    log:
        f"{RESULTS}/logs/generate_rollouts/{{track}}-{{policy}}-seed{{seed}}-{{test}}-{{shard}}-{{block}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/generate_rollouts/{{track}}-{{policy}}-seed{{seed}}-{{test}}-{{shard}}-{{block}}.tsv"
    conda:
        ENVIRONMENT
    threads: configuration.numeric_threads
    resources:
        **resources_of("generate_rollouts"),
    params:
        **stage("generate_rollouts"),
    shell:
        command("generate_rollouts", "base adapter subset images", "rollouts")
