"""What reruns if one key of the configuration, or the code of one module, changes: makes docs/reruns.md.

snakemake --cores all --configfile configs/test.yaml    # a finished run to ask about
python -m workflow_scripts.reference.reruns

Each row about a key is one real `snakemake -n` on the finished run, with a configuration in which only that key has
another value. The dry runs share this process, since most of the time of one is the start of Python.
"""

import argparse
import contextlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import snakemake.cli
import yaml

from workflow_scripts.configuration.model import Configuration, ConfigurationError
from workflow_scripts.configuration.overlays import read_configuration
from workflow_scripts.files.paths import ROOT
from workflow_scripts.reference.configuration import leaves
from workflow_scripts.running.code_digest import PACKAGE, module_closure

CONFIGFILE = "configs/test.yaml"
# Other values of keys whose type does not tell one.
CHOSEN: dict[str, Any] = {
    "seeds": [0, 1],
    "tracks": ["hpsv2"],
    "policies": ["zeroshot"],
    "datasets.imagereward.hub.test_only": False,  # true needs policies: [zeroshot], and so for HPDv2
    "datasets.hpsv2.hub.test_only": False,
    "cross_tests": [{"track": "hpsv2", "test": "imagereward"}, {"track": "imagereward", "test": "hpsv2"}],
    "scoring.report_k": [1, 2],
    "distributed.strategy": "ddp",  # the others need a GPU
    "datasets.own.annotations": "pairs.jsonl",
    "ranking.images": "examples/prompts.csv",
    "policy.image_processor": {"do_normalize": False},
    **{f"training.{track}.epochs": 1.0 for track in ("imagereward", "hpsv2", "own")},
}
# What other keys of its section must be where a key of training has another value.
NEEDED: dict[str, dict[str, Any]] = {
    "epochs": {"steps": None},
    **{key: {"reward_signal": "sampled"} for key in ("scale_rewards", "importance_sampling_level", "generation")},
}
# Configurations that between them use every rule.
SOURCES: list[dict[str, Any]] = [
    {},
    {"datasets": {"imagereward": {"source": "hub"}, "hpsv2": {"source": "hub"}}},
    {"policy": {"source": "cold_start"}},
    {"tracks": ["imagereward", "hpsv2", "own"]},
    {"ranking": {"images": "examples/prompts.csv"}},
]


class Job(NamedTuple):
    """A job that a dry run announces: it makes anew what is there (`reruns`), or only what is not."""

    rule: str
    outputs: list[str]
    reruns: bool


class FinishedRun:
    """The finished run of configs/test.yaml in this checkout, for dry runs to ask about."""

    def __init__(self) -> None:
        """Read the configuration that the run was made with."""
        self.configuration = self.changed({})

    def changed(self, change: dict[str, Any]) -> Configuration:
        """The run's configuration with other values.

        Raises:
            ConfigurationError: these are not valid.
        """
        return read_configuration([ROOT / CONFIGFILE], change)

    def snakemake(self, *options: str, change: dict[str, Any]) -> str:
        """What the command line of Snakemake says with these options and other values in the configuration.

        Raises:
            RuntimeError: it failed; holds all it said.
        """
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as overlay, tempfile.TemporaryFile("w+") as said:
            yaml.safe_dump(change, overlay)
            overlay.flush()
            command = ["--directory", str(ROOT), "--snakefile", str(ROOT / "Snakefile"), *options]
            command += ["--workflow-profile", str(ROOT / "profiles/default")]
            command += ["--configfile", str(ROOT / CONFIGFILE), overlay.name]
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    snakemake.cli.main(command)
                except SystemExit as end:
                    failed = end.code
            said.seek(0)
            everything = said.read()
        if failed:
            raise RuntimeError(f"snakemake {' '.join(options)} with {change} failed:\n{everything}")
        return everything

    def jobs(self, *options: str, change: dict[str, Any]) -> list[Job]:
        """Jobs that a dry run announces."""
        found = []
        said = self.snakemake("-n", *options, change=change)
        for rule, block in re.findall(r"^rule (\w+):\n((?:    .*\n)+)", said, re.M):
            if outputs := re.findall(r"^    output: (.+)$", block, re.M):
                names = outputs[0].split(", ")
                found.append(Job(rule, names, any((ROOT / name).exists() for name in names)))
        return found


def stages() -> dict[str, str]:
    """Stage of every rule, in the order of the workflow."""
    files = re.findall(r'^include: "(.+)"', (ROOT / "Snakefile").read_text(encoding="utf-8"), re.M)
    rules = "".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    named = re.findall(r'^(?:use )?rule (\w+)(?: as (\w+) with)?:.*?\*\*stage\("(\w+)"', rules, re.M | re.S)
    return {copy or rule: stage for rule, copy, stage in named}


def modules() -> list[str]:
    """Every module of the package, without the package's name."""
    folder = ROOT / PACKAGE
    paths = sorted(path for path in folder.rglob("*.py") if path.name != "__init__.py")
    return [".".join(path.relative_to(folder).with_suffix("").parts) for path in paths]


# ----------------------------------------------------------------------------------------------------- what keys rerun


def nested(key: str, value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` for the key "a.b"."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def changing(key: str, value: Any) -> dict[str, Any]:
    """Overlay with another value of a key, and with those of other keys that it needs."""
    section, _, name = key.rpartition(".")
    values = {name: value} | NEEDED.get(name, {})
    return nested(section, values) if section else values


def candidates(annotation: Any, value: Any) -> Iterator[Any]:
    """Values of the same type near the given one; some may be out of bounds."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, 2 * value, value - 1)
    elif isinstance(value, float):
        yield from (value / 2, (value + 1) / 2)
    elif isinstance(value, str):
        yield f"{value}-other"


def other_value(run: FinishedRun, key: str, annotation: Any, value: Any) -> Any:
    """A valid value of a key other than the run's; None where its type allows no other.

    Raises:
        LookupError: none is known; one belongs in CHOSEN.
    """
    proposed = [CHOSEN[key]] if key in CHOSEN else list(candidates(annotation, value))
    for candidate in proposed:
        with contextlib.suppress(ConfigurationError):
            if run.changed(changing(key, candidate)) != run.configuration:
                return candidate
    if proposed == [value]:
        return None
    raise LookupError(f"{key}: no other valid value than {value!r} is known; add one to CHOSEN in {__file__}")


def key_rows(run: FinishedRun) -> dict[str, tuple[str, list[str]]]:
    """By key: the change that was tried, and a cell for each rule."""
    every = Counter(job.rule for job in run.jobs("--forceall", change={}))
    rows = {}
    for key, field, value in leaves(run.configuration):
        other = other_value(run, key, field.annotation, value)
        jobs = [] if other is None else run.jobs(change=changing(key, other))
        again = Counter(job.rule for job in jobs if job.reruns)
        new = Counter(job.rule for job in jobs if not job.reruns)
        if other is None:
            shown = f"{text(value)}, its only value here"
        else:
            shown = "" if field.annotation is str else f"{text(value)} → {text(other)}"
        rows[key] = shown, [cell(again[rule], every[rule], new[rule]) for rule in stages()]
    return rows


def text(value: Any) -> str:
    """A value as one would write it in the configuration."""
    return value if isinstance(value, str) else json.dumps(value, default=lambda section: section.model_dump())


def cell(again: int, of: int, new: int) -> str:
    """How many jobs of a rule run again, and how many are new."""
    parts = [f"● {again}/{of}" if again < of else "●"] if again else []
    return " ".join(parts + [f"+{new}"] * bool(new))


# -------------------------------------------------------------------------------------------------- what modules rerun


def rules_after(run: FinishedRun) -> dict[str, set[str]]:
    """By rule: those that follow from it, directly or not, whatever the source of data and policy."""
    edges: dict[str, set[str]] = {rule: set() for rule in stages()}
    for change in SOURCES:
        graph = run.snakemake("--rulegraph", "--forceall", change=change)
        names = dict(re.findall(r'^\s*(\d+)\[label = "(\w+)"', graph, re.M))
        for before, after in re.findall(r"^\s*(\d+) -> (\d+)", graph, re.M):
            if names[after] in edges:
                edges[names[before]].add(names[after])
    for rule in reversed(edges):  # the order of the workflow, so what follows is complete already
        edges[rule] |= {further for after in edges[rule] for further in edges[after]}
    return edges


def module_rows(run: FinishedRun) -> dict[str, list[str]]:
    """By module: a cell for each rule, from the code digests of the stages."""
    after = rules_after(run)
    engine = run.configuration.rollouts.engine
    closures = {rule: module_closure(f"{PACKAGE}.stages.{stage}", engine) for rule, stage in stages().items()}
    rows = {}
    for module in modules():
        own = {rule for rule, closure in closures.items() if f"{PACKAGE}.{module}" in closure}
        follow = {further for rule in own for further in after[rule]} - own
        rows[module] = ["●" if rule in own else "○" if rule in follow else "" for rule in stages()]
    return rows


# ------------------------------------------------------------------------------------------------------------ the page

PAGE = """# What reruns if I change …

Made by `make reruns` from real dry runs on a finished run of `configs/test.yaml`; a test makes it again and compares.

## … a key of the configuration

One row is one `snakemake -n` with another value of that key alone. **●** every job of the rule runs again, **● 2/5**
two of its five; **+3** three jobs make something that was not there, and what is there stays. An empty row reruns
nothing. Keys that do the same share a row. Both data sets are synthetic here and the policy is the bundled one: keys of
`hub` and `cold_start` matter where `source` says so, those of `own` where a policy is trained or tested on own data.
What generates in training, and the strategy of several processes, have other values only on a GPU; there they rerun
training, and the keys of `vllm` what vLLM generates.

{keys}

## … code

**●** the rule runs this module, **○** it follows from one that does. Comments, docstrings, formatting and the order of
imports do not count; the templates and data files that a module names count with it. Rooms decide: nothing in
`configuration`, `running` and `tracking` counts, everything else that a stage imports does. A change of a module with
an empty row reruns nothing: no stage imports it, or it only decides what a stage is given, which counts as a key, or
records what a stage did. `download_dataset` and `cold_start_policy` run, and have followers, only where `source` says
so; the module of the vLLM engine only where vLLM generates.

{modules}
"""


def table(first: str, rows: dict[tuple[str, tuple[str, ...]], list[str]]) -> str:
    """A Markdown table with one column for each rule; the names of equal rows stand one below the other."""
    lines = [[first, *(rule.replace("_", "<br>") for rule in stages())], ["---", *[":-:"] * len(stages())]]
    lines += [["<br>".join(names), *cells] for (_, cells), names in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render(run: FinishedRun) -> str:
    """Text of docs/reruns.md."""
    keys: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for key, (shown, cells) in key_rows(run).items():
        section = ".".join(key.split(".")[:-1][:2])
        keys.setdefault((section, tuple(cells)), []).append(f"`{key}`" + (f": {shown}" if shown else ""))
    by_code: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for module, cells in module_rows(run).items():
        by_code.setdefault(("", tuple(cells)), []).append(f"`{module}`")
    return PAGE.format(keys=table("key", keys), modules=table("module", by_code))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs/reruns.md", help="page to write")
    arguments = parser.parse_args()
    os.environ["MLFLOW_TRACKING_URI"] = ""
    run = FinishedRun()
    if left := run.jobs(change={}):
        raise SystemExit(
            f"{run.configuration.results} holds no finished run, {len(left)} jobs are left; "
            f"run snakemake --cores all --configfile {CONFIGFILE} first"
        )
    arguments.output.write_text(render(run), encoding="utf-8")


if __name__ == "__main__":
    main()
