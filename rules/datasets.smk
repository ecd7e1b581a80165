# Raw layouts, canonical annotations, what is kept of them, and the images of that. They come before rollouts of the
# untrained policy, so that training, the longest job, can start soon.


rule synthesize_dataset:
    output:
        record=f"{DOWNLOADS}/synthetic/{{dataset}}/dataset.json",
        provenance=f"{DOWNLOADS}/synthetic/{{dataset}}/dataset.json.provenance.json",
    log:
        f"{RESULTS}/logs/synthesize_dataset/{{dataset}}.log",
    priority: 5
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "synthesize_dataset"),
    params:
        config=lambda w: stages.SynthesizeDataset.of(
            configuration, w.dataset
        ).canonical(),
        code=code_digest("synthesize_dataset"),
    shell:
        "python -m workflow_scripts.stages.synthesize_dataset --output {output.record}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"


rule download_dataset:
    output:
        record=f"{DOWNLOADS}/hub/{{dataset}}/dataset.json",
        provenance=f"{DOWNLOADS}/hub/{{dataset}}/dataset.json.provenance.json",
    log:
        f"{RESULTS}/logs/download_dataset/{{dataset}}.log",
    priority: 5
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "download_dataset"),
    params:
        config=lambda w: stages.DownloadDataset.of(configuration, w.dataset).canonical(),
        code=code_digest("download_dataset"),
    shell:
        "python -m workflow_scripts.stages.download_dataset --output {output.record}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"


# Only a record: the user's files stay where they are.
rule record_own_data:
    input:
        targets.own_files(configuration),
    output:
        record=f"{RESULTS}/datasets/own/dataset.json",
        provenance=f"{RESULTS}/datasets/own/dataset.json.provenance.json",
    log:
        f"{RESULTS}/logs/record_own_data.log",
    priority: 5
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "record_own_data"),
    params:
        config=lambda w: stages.RecordOwnData.of(configuration).canonical(),
        code=code_digest("record_own_data"),
    shell:
        "python -m workflow_scripts.stages.record_own_data --output {output.record}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"


rule read_annotations:
    input:
        record=lambda w: targets.dataset_record(configuration, w.dataset),
    output:
        preferences=f"{RESULTS}/datasets/{{dataset}}/{{split}}/preferences.parquet",
        provenance=f"{RESULTS}/datasets/{{dataset}}/{{split}}/preferences.parquet.provenance.json",
    log:
        f"{RESULTS}/logs/read_annotations/{{dataset}}-{{split}}.log",
    priority: 5
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "read_annotations"),
    params:
        config=lambda w: stages.ReadAnnotations.of(
            configuration, w.dataset, w.split
        ).canonical(),
        code=code_digest("read_annotations"),
    shell:
        "python -m workflow_scripts.stages.read_annotations --record {input.record} --output {output.preferences}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"


rule select_training_subset:
    input:
        preferences=f"{RESULTS}/datasets/{{dataset}}/train/preferences.parquet",
        test=f"{RESULTS}/datasets/{{dataset}}/test/preferences.parquet",
    output:
        subset=f"{RESULTS}/datasets/{{dataset}}/train/subset.parquet",
        provenance=f"{RESULTS}/datasets/{{dataset}}/train/subset.parquet.provenance.json",
    log:
        f"{RESULTS}/logs/select_subset/{{dataset}}-train.log",
    priority: 5
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "select_training_subset"),
    params:
        config=lambda w: stages.SelectSubset.of(
            configuration, w.dataset, "train"
        ).canonical(),
        code=code_digest("select_subset"),
    shell:
        "python -m workflow_scripts.stages.select_subset --preferences {input.preferences} --test_preferences {input.test}"
        " --output {output.subset} --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"


# HPDv2 has no validation split: its validation prompts come from the far end of the training prompts' hash order.
rule select_validation_subset:
    input:
        preferences=lambda w: f"{RESULTS}/datasets/{w.dataset}/{VALIDATION_FROM[w.dataset]}/preferences.parquet",
        train=lambda w: targets.separate_training_preferences(configuration, w.dataset),
        test=f"{RESULTS}/datasets/{{dataset}}/test/preferences.parquet",
    output:
        subset=f"{RESULTS}/datasets/{{dataset}}/validation/subset.parquet",
        provenance=f"{RESULTS}/datasets/{{dataset}}/validation/subset.parquet.provenance.json",
    log:
        f"{RESULTS}/logs/select_subset/{{dataset}}-validation.log",
    priority: 5
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "select_validation_subset"),
    params:
        config=lambda w: stages.SelectSubset.of(
            configuration, w.dataset, "validation"
        ).canonical(),
        code=code_digest("select_subset"),
    shell:
        "python -m workflow_scripts.stages.select_subset --preferences {input.preferences} --test_preferences {input.test}"
        " $(test -z '{input.train}' || echo --train_preferences {input.train}) --output {output.subset}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"


rule order_test_prompts:
    input:
        preferences=f"{RESULTS}/datasets/{{dataset}}/test/preferences.parquet",
    output:
        subset=f"{RESULTS}/datasets/{{dataset}}/test/subset.parquet",
        provenance=f"{RESULTS}/datasets/{{dataset}}/test/subset.parquet.provenance.json",
    log:
        f"{RESULTS}/logs/select_subset/{{dataset}}-test.log",
    priority: 5
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "order_test_prompts"),
    params:
        config=lambda w: stages.SelectSubset.of(
            configuration, w.dataset, "test"
        ).canonical(),
        code=code_digest("select_subset"),
    shell:
        "python -m workflow_scripts.stages.select_subset --preferences {input.preferences} --output {output.subset}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"


rule read_images:
    input:
        record=lambda w: targets.dataset_record(configuration, w.dataset),
        subset=f"{RESULTS}/datasets/{{dataset}}/{{split}}/subset.parquet",
    output:
        images=f"{RESULTS}/datasets/{{dataset}}/{{split}}/images-{{shard}}.parquet",
        listing=f"{RESULTS}/datasets/{{dataset}}/{{split}}/images-{{shard}}.json",
        provenance=f"{RESULTS}/datasets/{{dataset}}/{{split}}/images-{{shard}}.parquet.provenance.json",
    log:
        f"{RESULTS}/logs/read_images/{{dataset}}-{{split}}-{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/read_images/{{dataset}}-{{split}}-{{shard}}.tsv"
    priority: 5
    conda:
        "../envs/softpref.yaml"
    resources:
        **jobs.job_resources(configuration, "read_images"),
    params:
        config=lambda w: stages.ReadImages.of(
            configuration, w.dataset, w.split, int(w.shard)
        ).canonical(),
        code=code_digest("read_images"),
    shell:
        "python -m workflow_scripts.stages.read_images --record {input.record} --subset {input.subset}"
        " --output {output.images} --listing {output.listing}"
        " --config {params.config:q} --code_digest {params.code} --log_file {log} &> {log}"
