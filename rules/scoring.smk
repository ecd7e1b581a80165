# From recorded logits to accuracies: no model needed.


rule score_rollouts:
    input:
        rollouts=lambda w: expand(
            rules.generate_rollouts.output.rollouts,
            **w,
            shard=[f"{n:04d}" for n in targets.shards(configuration, w.test)],
            block=[f"{n:04d}" for n in range(configuration.rollouts.blocks)],
        ),
    output:
        scores=f"{RESULTS}/scores/{{track}}/{{policy}}/seed{{seed}}/{{test}}.parquet",
        provenance=f"{RESULTS}/scores/{{track}}/{{policy}}/seed{{seed}}/{{test}}.parquet{SUFFIX}",
    log:
        f"{RESULTS}/logs/score_rollouts/{{track}}-{{policy}}-seed{{seed}}-{{test}}.log",
    conda:
        ENVIRONMENT
    resources:
        **resources_of("score_rollouts"),
    params:
        **stage("score_rollouts"),
    shell:
        command("score_rollouts", "rollouts", "scores")


rule measure_accuracy:
    input:
        scores=rules.score_rollouts.output.scores,
        subset=f"{RESULTS}/datasets/{{test}}/test/subset.parquet",
        record=lambda w: targets.dataset_record(configuration, w.test),
    output:
        accuracy=f"{RESULTS}/accuracy/{{track}}/{{policy}}/seed{{seed}}/{{test}}.json",
        prompts=f"{RESULTS}/accuracy/{{track}}/{{policy}}/seed{{seed}}/{{test}}-prompts.parquet",
        provenance=f"{RESULTS}/accuracy/{{track}}/{{policy}}/seed{{seed}}/{{test}}.json{SUFFIX}",
    log:
        f"{RESULTS}/logs/measure_accuracy/{{track}}-{{policy}}-seed{{seed}}-{{test}}.log",
    conda:
        ENVIRONMENT
    resources:
        **resources_of("measure_accuracy"),
    params:
        **stage("measure_accuracy"),
    shell:
        command("measure_accuracy", "scores subset record", "accuracy prompts")
