# Raw layouts, canonical annotations, the subset that is kept, and its images. These jobs come before the rollouts of
# the untrained policy, so that training, the longest job, can start soon.


rule synthesize_dataset:
    output:
        record=f"{DOWNLOADS}/synthetic/{{dataset}}/dataset.json",
        provenance=f"{DOWNLOADS}/synthetic/{{dataset}}/dataset.json{SUFFIX}",
    log:
        f"{RESULTS}/logs/synthesize_dataset/{{dataset}}.log",
    priority: 5
    conda:
        ENVIRONMENT
    resources:
        **resources_of("synthesize_dataset"),
    params:
        **stage("synthesize_dataset"),
    shell:
        command("synthesize_dataset", "", "record")


rule download_dataset:
    output:
        record=f"{DOWNLOADS}/hub/{{dataset}}/dataset.json",
        provenance=f"{DOWNLOADS}/hub/{{dataset}}/dataset.json{SUFFIX}",
    log:
        f"{RESULTS}/logs/download_dataset/{{dataset}}.log",
    priority: 5
    conda:
        ENVIRONMENT
    resources:
        **resources_of("download_dataset"),
    params:
        **stage("download_dataset"),
    shell:
        command("download_dataset", "", "record")


# Only a record: the user's files stay where they are.
rule record_own_data:
    input:
        targets.own_files(configuration),
    output:
        record=f"{RESULTS}/datasets/own/dataset.json",
        provenance=f"{RESULTS}/datasets/own/dataset.json{SUFFIX}",
    log:
        f"{RESULTS}/logs/record_own_data.log",
    priority: 5
    conda:
        ENVIRONMENT
    resources:
        **resources_of("record_own_data"),
    params:
        **stage("record_own_data"),
    shell:
        command("record_own_data", "", "record")


rule read_annotations:
    input:
        record=lambda w: targets.dataset_record(configuration, w.dataset),
    output:
        preferences=f"{RESULTS}/datasets/{{dataset}}/{{split}}/preferences.parquet",
        provenance=f"{RESULTS}/datasets/{{dataset}}/{{split}}/preferences.parquet{SUFFIX}",
    log:
        f"{RESULTS}/logs/read_annotations/{{dataset}}-{{split}}.log",
    priority: 5
    conda:
        ENVIRONMENT
    resources:
        **resources_of("read_annotations"),
    params:
        **stage("read_annotations"),
    shell:
        command("read_annotations", "record", "preferences")


rule select_training_subset:
    input:
        preferences=f"{RESULTS}/datasets/{{dataset}}/train/preferences.parquet",
        train_preferences=[],
        test_preferences=f"{RESULTS}/datasets/{{dataset}}/test/preferences.parquet",
    output:
        subset=f"{RESULTS}/datasets/{{dataset}}/train/subset.parquet",
        provenance=f"{RESULTS}/datasets/{{dataset}}/train/subset.parquet{SUFFIX}",
    log:
        f"{RESULTS}/logs/select_subset/{{dataset}}-train.log",
    priority: 5
    conda:
        ENVIRONMENT
    resources:
        **resources_of("select_training_subset"),
    params:
        **stage("select_subset", split="train"),
    shell:
        command(
            "select_subset", "preferences train_preferences test_preferences", "subset"
        )


# HPDv2 has no validation split: its validation prompts come from the far end of the training prompts' hash order.
use rule select_training_subset as select_validation_subset with:
    input:
        preferences=lambda w: f"{RESULTS}/datasets/{w.dataset}/{VALIDATION_FROM[w.dataset]}/preferences.parquet",
        train_preferences=lambda w: targets.separate_training_preferences(
            configuration, w.dataset
        ),
        test_preferences=f"{RESULTS}/datasets/{{dataset}}/test/preferences.parquet",
    output:
        subset=f"{RESULTS}/datasets/{{dataset}}/validation/subset.parquet",
        provenance=f"{RESULTS}/datasets/{{dataset}}/validation/subset.parquet{SUFFIX}",
    log:
        f"{RESULTS}/logs/select_subset/{{dataset}}-validation.log",
    resources:
        **resources_of("select_validation_subset"),
    params:
        **stage("select_subset", split="validation"),


use rule select_training_subset as order_test_prompts with:
    input:
        preferences=f"{RESULTS}/datasets/{{dataset}}/test/preferences.parquet",
        train_preferences=[],
        test_preferences=[],
    output:
        subset=f"{RESULTS}/datasets/{{dataset}}/test/subset.parquet",
        provenance=f"{RESULTS}/datasets/{{dataset}}/test/subset.parquet{SUFFIX}",
    log:
        f"{RESULTS}/logs/select_subset/{{dataset}}-test.log",
    resources:
        **resources_of("order_test_prompts"),
    params:
        **stage("select_subset", split="test"),


rule read_images:
    input:
        record=lambda w: targets.dataset_record(configuration, w.dataset),
        subset=f"{RESULTS}/datasets/{{dataset}}/{{split}}/subset.parquet",
    output:
        images=f"{RESULTS}/datasets/{{dataset}}/{{split}}/images-{{shard}}.parquet",
        listing=f"{RESULTS}/datasets/{{dataset}}/{{split}}/images-{{shard}}.json",
        provenance=f"{RESULTS}/datasets/{{dataset}}/{{split}}/images-{{shard}}.parquet{SUFFIX}",
    log:
        f"{RESULTS}/logs/read_images/{{dataset}}-{{split}}-{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/read_images/{{dataset}}-{{split}}-{{shard}}.tsv"
    priority: 5
    conda:
        ENVIRONMENT
    resources:
        **resources_of("read_images"),
    params:
        **stage("read_images"),
    shell:
        command("read_images", "record subset", "images listing")
