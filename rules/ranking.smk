# Images that are no data set, ranked by a trained policy: with `ranking.images`.


rule rank_own_images:
    input:
        base=rules.prepare_base_policy.output.manifest,
        adapter=rules.train_grpo.output.adapter.format(
            track=configuration.ranking.track, seed=configuration.ranking.seed
        ),
        images=lambda w: ranked_images(
            configuration.ranking.images, configuration.ranking.prompt
        ),
    output:
        table=f"{RESULTS}/ranking/ranking.csv",
        rows=f"{RESULTS}/ranking/ranking.jsonl",
        page=f"{RESULTS}/ranking/ranking.html",
        provenance=f"{RESULTS}/ranking/ranking.csv{SUFFIX}",
    log:
        f"{RESULTS}/logs/rank_own_images.log",
    benchmark:
        f"{RESULTS}/benchmarks/rank_own_images.tsv"
    conda:
        ENVIRONMENT
    threads: configuration.numeric_threads
    resources:
        **resources_of("rank_own_images"),
    params:
        **stage("rank_own_images"),
    shell:
        command("rank_own_images", "base adapter", "table rows page")
