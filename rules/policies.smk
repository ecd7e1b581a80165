# The base policy: bundled, cold-started from scratch, or from the Hub.


rule cold_start_policy:
    output:
        model=f"{RESULTS}/policies/cold_start/model.safetensors",
        provenance=f"{RESULTS}/policies/cold_start/model.safetensors.provenance.json",
    log:
        f"{RESULTS}/logs/cold_start_policy.log",
    benchmark:
        f"{RESULTS}/benchmarks/cold_start_policy.tsv"
    conda:
        "../envs/softpref.yaml"
    threads: configuration.numeric_threads
    resources:
        **jobs.job_resources(configuration, "cold_start_policy"),
    params:
        config=lambda w: stages.ColdStartPolicy.of(configuration).canonical(),
        code=code_digest("cold_start_policy"),
    shell:
        "python -m workflow_scripts.stages.cold_start_policy --model {output.model}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"


rule prepare_base_policy:
    input:
        cold_start=(
            rules.cold_start_policy.output.model
            if configuration.policy.source == "cold_start"
            else []
        ),
        bundled=bundled_files(configuration.policy),
    output:
        manifest=f"{RESULTS}/policies/base/manifest.json",
        provenance=f"{RESULTS}/policies/base/manifest.json.provenance.json",
    log:
        f"{RESULTS}/logs/prepare_base_policy.log",
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "prepare_base_policy"),
    params:
        config=lambda w: stages.PrepareBasePolicy.of(configuration).canonical(),
        code=code_digest("prepare_base_policy"),
    shell:
        "python -m workflow_scripts.stages.prepare_base_policy --manifest {output.manifest}"
        " $(test -z '{input.cold_start}' || echo --cold_start {input.cold_start})"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"
