# What people look at.


rule make_gallery:
    input:
        rollouts=lambda w: expand(
            f"{RESULTS}/rollouts/{w.track}/{w.policy}/seed{w.seed}/{w.test}/{{shard:04d}}-{{block:04d}}.parquet",
            shard=stages.gallery_shards(configuration, w.test),
            block=range(configuration.rollouts.blocks),
        ),
        scores=rules.score_rollouts.output.scores,
        subset=f"{RESULTS}/datasets/{{test}}/test/subset.parquet",
        images=lambda w: expand(
            f"{RESULTS}/datasets/{w.test}/test/images-{{shard:04d}}.parquet",
            shard=stages.gallery_shards(configuration, w.test),
        ),
    output:
        gallery=f"{RESULTS}/gallery/{{track}}/{{policy}}/seed{{seed}}/{{test}}.parquet",
        provenance=f"{RESULTS}/gallery/{{track}}/{{policy}}/seed{{seed}}/{{test}}.parquet.provenance.json",
    log:
        f"{RESULTS}/logs/make_gallery/{{track}}-{{policy}}-seed{{seed}}-{{test}}.log",
    priority: 1  # before the tables, whose runs then stand on top of MLflow's list
    conda:
        "../envs/softpref.yaml"
    resources:
        **stages.job_resources(configuration, "make_gallery"),
    params:
        config=lambda w: stages.MakeGallery.of(
            configuration, w.track, w.policy, w.test, int(w.seed)
        ).canonical(),
        code=code_digest("make_gallery"),
    shell:
        "python -m workflow_scripts.make_gallery {input.rollouts} --scores {input.scores} --subset {input.subset}"
        " $(printf -- '--images %s ' {input.images}) --output {output.gallery}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"
