# softpref: from published preference data to the paper's tables.
#
# The grammar of every path:
#   {dataset}  imagereward | hpsv2 | own              {split}  train | validation | test
#   {track}    training set, with its protocol: imagereward (pointwise), hpsv2 (pairwise), own (configured)
#   {policy}   zeroshot | grpo                        {test}   data set it is tested on
#   {seed} {shard} {block}   numbers; a shard holds a fixed number of test prompts, a block of rollouts of each item
# Every job writes one sidecar, <first output>.provenance.json, an output that is never an input.
# The parameters of every rule are two strings: the canonical configuration it uses and the digest of its code.
import gc
import os
import shlex
import sys
import time
from pathlib import Path

from snakemake.io import IOFile
from snakemake.utils import min_version

min_version("9.0")
gc.freeze()  # the collector skips imported objects: searching them takes a while
sys.path.insert(0, str(workflow.basedir))

from workflow_scripts.configuration import jobs, stages, targets
from workflow_scripts.configuration.model import VALIDATION_FROM, load
from workflow_scripts.running.locks import Lock
from workflow_scripts.running.arithmetic import other_digits
from workflow_scripts.running.code_digest import code_digest
from workflow_scripts.running.environment import stage_environment, start_of
from workflow_scripts.running.mismatches import refuse_unrecorded
from workflow_scripts.running.provenance import SUFFIX
from workflow_scripts.policy.manifest import ADAPTER, bundled_files
from workflow_scripts.ranking.listing import ranked_images


configfile: os.path.join(workflow.basedir, "config.yaml")


configuration = load(config)
os.environ.update(stage_environment(configuration))
RESULTS = configuration.results
DOWNLOADS = configuration.downloads
LOCK = Lock.of_results(Path(RESULTS))
STARTED = time.time()


# A dry run does not get here. Snakemake locks the working directory, but two of them may share a results folder. The
# machine is checked before anything is downloaded; on a cluster each GPU job checks its own (take_gpus).
# Imported lazily so that dry runs start fast.
onstart:
    started = {job.rule.name for job in workflow.dag.needrun_jobs()}
    jobs.check_interpreters(configuration, started)
    line = other_digits(configuration.numeric_instructions)
    if line and configuration.policy.device == "cpu":
        print(f"note: {line}", file=sys.stderr)
    if workflow.local_exec and configuration.policy.device == "cuda":
        from workflow_scripts.preflight.machine import check_run

        check_run(configuration, started)
    LOCK.acquire()


onsuccess:
    from workflow_scripts.commands import log_runs, register, summary

    LOCK.release()
    summary.tell_success(configuration, STARTED)
    log_runs.remind(configuration)
    register.register_at_the_end(configuration)


onerror:
    from workflow_scripts.commands import log_runs, summary

    LOCK.release()
    summary.tell_failure(log)
    log_runs.remind(configuration)


wildcard_constraints:
    dataset="imagereward|hpsv2|own",
    track="imagereward|hpsv2|own",
    test="imagereward|hpsv2|own",
    policy="zeroshot|grpo",
    split="train|validation|test",
    seed=r"\d+",
    shard=r"\d{4}",
    block=r"\d{4}",


rule all:
    default_target: True
    input:
        f"{RESULTS}/table1.csv",
        f"{RESULTS}/table2.csv",
        f"{RESULTS}/comparisons.csv",
        f"{RESULTS}/sensitivity.csv",
        f"{RESULTS}/tables.md",
        targets.gallery_files(configuration),
        expand(f"{RESULTS}/figures/{{name}}.svg", name=targets.FIGURES),
        f"{RESULTS}/report.html",
        targets.ranking_files(configuration),


include: "rules/common.smk"
include: "rules/datasets.smk"
include: "rules/policies.smk"
include: "rules/training.smk"
include: "rules/rollouts.smk"
include: "rules/scoring.smk"
include: "rules/tables.smk"
include: "rules/report.smk"
include: "rules/ranking.smk"
