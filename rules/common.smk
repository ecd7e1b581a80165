# What all rules share: the parameters of a stage, its command and its resources.
from functools import partial

# Environment of a stage with --sdm conda; the path starts at the rule's file.
ENVIRONMENT = "../envs/softpref.yaml"


def stage(name, **fixed):
    """Parameters of a rule: what its stage uses of the configuration, as text, and the digest of the stage's code.

    The wildcards of the rule, and those fixed here, are the arguments of the stage's selection `of`.
    """
    select = partial(stages.STAGES[name].of, configuration, **fixed)
    engine = (
        configuration.rollouts.engine if name == "generate_rollouts" else "transformers"
    )
    return {
        "config": lambda wildcards: select(**typed(wildcards)).canonical(),
        "code": code_digest(name, engine),
    }


def typed(wildcards):
    """Wildcards by name, those that are numbers as such."""
    return {
        name: int(value) if value.isdigit() else value
        for name, value in wildcards.items()
    }


def command(name, inputs, outputs, *others):
    """Shell command of a stage: its options have the names of the rule's inputs and outputs, listed by blanks.

    An option without a file is left out, and one takes several; StageArguments reads both.
    """
    words = [
        f"{start_of(configuration, name)} -m workflow_scripts.stages.{name}",
        *(f"--{option} {{input.{option}:q}}" for option in inputs.split()),
        *(f"--{option} {{output.{option}:q}}" for option in outputs.split()),
        *others,
        "--config {params.config:q} --code_digest {params.code}",
        "--log_file {log:q} &> {log:q}",
    ]
    return " ".join(words)


def resources_of(rule):
    """GPUs, memory and time of a rule's job, from the configuration."""
    return jobs.job_resources(configuration, rule)
