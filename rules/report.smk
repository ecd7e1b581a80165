# What people look at.


rule make_gallery:
    input:
        rollouts=lambda w: expand(
            f"{RESULTS}/rollouts/{w.track}/{w.policy}/seed{w.seed}/{w.test}/{{shard:04d}}-{{block:04d}}.parquet",
            shard=targets.gallery_shards(configuration, w.test),
            block=range(configuration.rollouts.blocks),
        ),
        scores=rules.score_rollouts.output.scores,
        subset=f"{RESULTS}/datasets/{{test}}/test/subset.parquet",
        images=lambda w: expand(
            f"{RESULTS}/datasets/{w.test}/test/images-{{shard:04d}}.parquet",
            shard=targets.gallery_shards(configuration, w.test),
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
        **jobs.job_resources(configuration, "make_gallery"),
    params:
        config=lambda w: stages.MakeGallery.of(
            configuration, w.track, w.policy, w.test, int(w.seed)
        ).canonical(),
        code=code_digest("make_gallery"),
    shell:
        "python -m workflow_scripts.stages.make_gallery {input.rollouts} --scores {input.scores} --subset {input.subset}"
        " $(printf -- '--images %s ' {input.images}) --output {output.gallery}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"


rule make_figures:
    input:
        rollouts=targets.rollout_files(configuration),
        scores=targets.score_files(configuration),
        subsets=expand(
            f"{RESULTS}/datasets/{{test}}/test/subset.parquet",
            test=targets.test_sets(configuration),
        ),
        adapters=expand(
            rules.train_grpo.output.adapter,
            track=configuration.tracks,
            seed=configuration.seeds,
        ),
    output:
        tables=expand(f"{RESULTS}/figures/{{name}}.csv", name=targets.FIGURES),
        images=expand(f"{RESULTS}/figures/{{name}}.png", name=targets.FIGURES),
        training_curves=report(
            f"{RESULTS}/figures/training_curves.svg",
            caption="../report/captions/training_curves.rst",
            category="Figures",
        ),
        mean_at_k=report(
            f"{RESULTS}/figures/mean_at_k.svg",
            caption="../report/captions/mean_at_k.rst",
            category="Figures",
        ),
        calibration_pairs=report(
            f"{RESULTS}/figures/calibration_pairs.svg",
            caption="../report/captions/calibration_pairs.rst",
            category="Figures",
        ),
        calibration_ratings=report(
            f"{RESULTS}/figures/calibration_ratings.svg",
            caption="../report/captions/calibration_ratings.rst",
            category="Figures",
        ),
        answers=report(
            f"{RESULTS}/figures/answers.svg",
            caption="../report/captions/answers.rst",
            category="Figures",
        ),
        rank_distance=report(
            f"{RESULTS}/figures/rank_distance.svg",
            caption="../report/captions/rank_distance.rst",
            category="Figures",
        ),
        confidence=report(
            f"{RESULTS}/figures/confidence.svg",
            caption="../report/captions/confidence.rst",
            category="Figures",
        ),
        tie_rules=report(
            f"{RESULTS}/figures/tie_rules.svg",
            caption="../report/captions/tie_rules.rst",
            category="Figures",
        ),
        presentation_order=report(
            f"{RESULTS}/figures/presentation_order.svg",
            caption="../report/captions/presentation_order.rst",
            category="Figures",
        ),
        anchor_rank=report(
            f"{RESULTS}/figures/anchor_rank.svg",
            caption="../report/captions/anchor_rank.rst",
            category="Figures",
        ),
        provenance=f"{RESULTS}/figures/{targets.FIGURES[0]}.csv.provenance.json",
    log:
        f"{RESULTS}/logs/make_figures.log",
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "make_figures"),
    params:
        config=lambda w: stages.MakeFigures.of(configuration).canonical(),
        code=code_digest("make_figures"),
    shell:
        "python -m workflow_scripts.stages.make_figures {input.rollouts}"
        " $(printf -- '--scores %s ' {input.scores}) $(printf -- '--subsets %s ' {input.subsets})"
        " $(printf -- '--adapters %s ' {input.adapters})"
        " $(printf -- '--figures %s ' {output.tables} {output.images} {output.training_curves} {output.mean_at_k}"
        " {output.calibration_pairs} {output.calibration_ratings} {output.answers} {output.rank_distance}"
        " {output.confidence} {output.tie_rules} {output.presentation_order} {output.anchor_rank})"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"


rule make_report:
    input:
        table1=rules.make_tables.output.table1,
        others=[
            rules.make_tables.output.table2,
            rules.make_tables.output.comparisons,
        ],
        figures=rules.make_figures.output.tables[0],
        drawings=[path for path in rules.make_figures.output if path.endswith(".svg")],
        galleries=targets.gallery_files(configuration),
    output:
        page=report(
            f"{RESULTS}/report.html",
            caption="../report/captions/report.rst",
            category="Report",
        ),
        provenance=f"{RESULTS}/report.html.provenance.json",
    log:
        f"{RESULTS}/logs/make_report.log",
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "make_report"),
    params:
        config=lambda w: stages.MakeReport.of(configuration).canonical(),
        code=code_digest("make_report"),
    shell:
        "python -m workflow_scripts.stages.make_report {input.galleries} --table1 {input.table1} --figures {input.figures}"
        " --page {output.page}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"
