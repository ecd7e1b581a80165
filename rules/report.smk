# What people look at.


rule make_gallery:
    input:
        rollouts=lambda w: expand(
            rules.generate_rollouts.output.rollouts,
            **w,
            shard=[f"{n:04d}" for n in targets.gallery_shards(configuration, w.test)],
            block=[f"{n:04d}" for n in range(configuration.rollouts.blocks)],
        ),
        scores=rules.score_rollouts.output.scores,
        subset=f"{RESULTS}/datasets/{{test}}/test/subset.parquet",
        images=lambda w: expand(
            f"{RESULTS}/datasets/{w.test}/test/images-{{shard:04d}}.parquet",
            shard=targets.gallery_shards(configuration, w.test),
        ),
    output:
        gallery=f"{RESULTS}/gallery/{{track}}/{{policy}}/seed{{seed}}/{{test}}.parquet",
        provenance=f"{RESULTS}/gallery/{{track}}/{{policy}}/seed{{seed}}/{{test}}.parquet{SUFFIX}",
    log:
        f"{RESULTS}/logs/make_gallery/{{track}}-{{policy}}-seed{{seed}}-{{test}}.log",
    priority: 1  # before the tables, whose runs then stand on top of the list in MLflow
    conda:
        ENVIRONMENT
    resources:
        **resources_of("make_gallery"),
    params:
        **stage("make_gallery"),
    shell:
        command("make_gallery", "rollouts scores subset images", "gallery")


rule make_figures:
    input:
        rollouts=targets.rollout_files(configuration),
        scores=targets.score_files(configuration),
        subsets=expand(
            f"{RESULTS}/datasets/{{test}}/test/subset.parquet",
            test=targets.test_sets(configuration),
        ),
        adapters=[
            f"{folder}/{ADAPTER}" for folder in targets.adapter_folders(configuration)
        ],
    output:
        tables=expand(f"{RESULTS}/figures/{{name}}.csv", name=targets.FIGURES),
        images=expand(f"{RESULTS}/figures/{{name}}.png", name=targets.FIGURES),
        drawings=[
            report(
                f"{RESULTS}/figures/{name}.svg",
                caption=f"../workflow_scripts/reporting/captions/{name}.rst",
                category="Figures",
            )
            for name in targets.FIGURES
        ],
        provenance=f"{RESULTS}/figures/{targets.FIGURES[0]}.csv{SUFFIX}",
    log:
        f"{RESULTS}/logs/make_figures.log",
    conda:
        ENVIRONMENT
    resources:
        **resources_of("make_figures"),
    params:
        **stage("make_figures"),
    shell:
        command(
            "make_figures",
            "rollouts scores subsets adapters",
            "",
            "--figures {output.tables:q} {output.images:q} {output.drawings:q}",
        )


rule make_report:
    input:
        table1=rules.make_tables.output.table1,
        others=[
            rules.make_tables.output.table2,
            rules.make_tables.output.comparisons,
        ],
        figures=rules.make_figures.output.tables[0],
        drawings=rules.make_figures.output.drawings,
        galleries=targets.gallery_files(configuration),
    output:
        page=report(
            f"{RESULTS}/report.html",
            caption="../workflow_scripts/reporting/captions/report.rst",
            category="Report",
        ),
        provenance=f"{RESULTS}/report.html{SUFFIX}",
    log:
        f"{RESULTS}/logs/make_report.log",
    conda:
        ENVIRONMENT
    resources:
        **resources_of("make_report"),
    params:
        **stage("make_report"),
    shell:
        command("make_report", "galleries table1 figures", "page")
