# The base policy: bundled, cold-started from scratch, or from the Hub.


rule cold_start_policy:
    output:
        model=f"{RESULTS}/policies/cold_start/model.safetensors",
        provenance=f"{RESULTS}/policies/cold_start/model.safetensors{SUFFIX}",
    log:
        f"{RESULTS}/logs/cold_start_policy.log",
    benchmark:
        f"{RESULTS}/benchmarks/cold_start_policy.tsv"
    conda:
        ENVIRONMENT
    threads: configuration.numeric_threads
    resources:
        **resources_of("cold_start_policy"),
    params:
        **stage("cold_start_policy"),
    shell:
        command("cold_start_policy", "", "model")


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
        provenance=f"{RESULTS}/policies/base/manifest.json{SUFFIX}",
    log:
        f"{RESULTS}/logs/prepare_base_policy.log",
    conda:
        ENVIRONMENT
    resources:
        **resources_of("prepare_base_policy"),
    params:
        **stage("prepare_base_policy"),
    shell:
        command("prepare_base_policy", "cold_start", "manifest")
