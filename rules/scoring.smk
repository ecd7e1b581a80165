# From recorded logits to accuracies: no model needed.


rule score_rollouts:
    input:
        rollouts=lambda w: expand(
            f"{RESULTS}/rollouts/{w.track}/{w.policy}/seed{w.seed}/{w.test}/{{shard:04d}}-{{block:04d}}.parquet",
            shard=targets.shards(configuration, w.test),
            block=range(configuration.rollouts.blocks),
        ),
    output:
        scores=f"{RESULTS}/scores/{{track}}/{{policy}}/seed{{seed}}/{{test}}.parquet",
        provenance=f"{RESULTS}/scores/{{track}}/{{policy}}/seed{{seed}}/{{test}}.parquet.provenance.json",
    log:
        f"{RESULTS}/logs/score_rollouts/{{track}}-{{policy}}-seed{{seed}}-{{test}}.log",
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "score_rollouts"),
    params:
        config=lambda w: stages.ScoreRollouts.of(
            configuration, w.track, w.policy, w.test, int(w.seed)
        ).canonical(),
        code=code_digest("score_rollouts"),
    shell:
        "python -m workflow_scripts.stages.score_rollouts {input.rollouts} --output {output.scores}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"


rule measure_accuracy:
    input:
        scores=rules.score_rollouts.output.scores,
        subset=f"{RESULTS}/datasets/{{test}}/test/subset.parquet",
        record=lambda w: targets.dataset_record(configuration, w.test),
    output:
        accuracy=f"{RESULTS}/accuracy/{{track}}/{{policy}}/seed{{seed}}/{{test}}.json",
        prompts=f"{RESULTS}/accuracy/{{track}}/{{policy}}/seed{{seed}}/{{test}}-prompts.parquet",
        provenance=f"{RESULTS}/accuracy/{{track}}/{{policy}}/seed{{seed}}/{{test}}.json.provenance.json",
    log:
        f"{RESULTS}/logs/measure_accuracy/{{track}}-{{policy}}-seed{{seed}}-{{test}}.log",
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "measure_accuracy"),
    params:
        config=lambda w: stages.MeasureAccuracy.of(
            configuration, w.track, w.policy, w.test, int(w.seed)
        ).canonical(),
        code=code_digest("measure_accuracy"),
    shell:
        "python -m workflow_scripts.stages.measure_accuracy --scores {input.scores} --subset {input.subset}"
        " --dataset_record {input.record} --output {output.accuracy} --prompts {output.prompts}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"
