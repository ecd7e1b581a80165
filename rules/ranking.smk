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
        provenance=f"{RESULTS}/ranking/ranking.csv.provenance.json",
    log:
        f"{RESULTS}/logs/rank_own_images.log",
    benchmark:
        f"{RESULTS}/benchmarks/rank_own_images.tsv"
    conda:
        "../envs/softpref.yaml"
    threads: configuration.numeric_threads
    resources:
        **jobs.job_resources(configuration, "rank_own_images"),
    params:
        config=lambda w: stages.RankOwnImages.of(configuration).canonical(),
        code=code_digest("rank_own_images", "transformers"),
    shell:
        f"{jobs.launcher(configuration, 'rank_own_images')} -m workflow_scripts.stages.rank_own_images"
        " --base {input.base} --adapter {input.adapter}"
        " --table {output.table} --rows {output.rows} --page {output.page}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"
