# The paper's tables, the comparisons behind them and what they would be under other rules.


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
        adapters=expand(
            rules.train_grpo.output.adapter,
            track=configuration.tracks,
            seed=configuration.seeds,
        ),
    output:
        table1=report(
            f"{RESULTS}/table1.csv",
            caption="../report/captions/table1.rst",
            category="Tables",
        ),
        table2=report(
            f"{RESULTS}/table2.csv",
            caption="../report/captions/table2.rst",
            category="Tables",
        ),
        comparisons=report(
            f"{RESULTS}/comparisons.csv",
            caption="../report/captions/comparisons.rst",
            category="Tables",
        ),
        sensitivity=report(
            f"{RESULTS}/sensitivity.csv",
            caption="../report/captions/sensitivity.rst",
            category="Tables",
        ),
        markdown=f"{RESULTS}/tables.md",
        provenance=f"{RESULTS}/table1.csv.provenance.json",
    log:
        f"{RESULTS}/logs/make_tables.log",
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "make_tables"),
    params:
        config=lambda w: stages.MakeTables.of(configuration).canonical(),
        code=code_digest("make_tables"),
    shell:
        "python -m workflow_scripts.stages.make_tables {input.accuracies} --base {input.base}"
        " $(printf -- '--adapters %s ' {input.adapters})"
        " --table1 {output.table1} --table2 {output.table2} --comparisons {output.comparisons}"
        " --sensitivity {output.sensitivity} --markdown {output.markdown}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"
