# The tables of the paper, the comparisons behind them, and the same accuracies under other rules.


rule make_tables:
    input:
        accuracies=targets.accuracy_files(configuration),
        # Stops where .snakemake/ is lost and the results that are here are another configuration's; adds nothing.
        nothing=lambda w: refuse_unrecorded(
            configuration,
            targets.accuracy_files(configuration),
            lambda path: workflow.persistence.metadata(IOFile(path)) is not None,
        ),
        base=rules.prepare_base_policy.output.manifest,
        adapters=[
            f"{folder}/{ADAPTER}" for folder in targets.adapter_folders(configuration)
        ],
    output:
        **{
            name: report(
                f"{RESULTS}/{name}.csv",
                caption=f"../workflow_scripts/reporting/captions/{name}.rst",
                category="Tables",
            )
            for name in ("table1", "table2", "comparisons", "sensitivity")
        },
        markdown=f"{RESULTS}/tables.md",
        provenance=f"{RESULTS}/table1.csv{SUFFIX}",
    log:
        f"{RESULTS}/logs/make_tables.log",
    conda:
        ENVIRONMENT
    resources:
        **resources_of("make_tables"),
    params:
        **stage("make_tables"),
    shell:
        command(
            "make_tables",
            "accuracies base adapters",
            "table1 table2 comparisons sensitivity markdown",
        )
