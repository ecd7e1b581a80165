"""The committed expectation of a configuration, and where the results of a run differ from it.

`tests/expected/{name}/` holds the tables of configs/{name}.yaml (`default`: of config.yaml) as a run wrote them, and
run.json: which configuration they belong to, SHA-256 of each adapter, rollouts file and score file, and the processor
that made them. `reference.expected` writes such a folder.
"""

import csv
import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from workflow_scripts.configuration import targets
from workflow_scripts.configuration.data_stages import ReadAnnotations, SelectSubset, SynthesizeDataset
from workflow_scripts.configuration.model import Configuration, Split, StageConfig
from workflow_scripts.configuration.stages import (
    GenerateRollouts,
    MakeTables,
    MeasureAccuracy,
    PrepareBasePolicy,
    ScoreRollouts,
    TrainGrpo,
)
from workflow_scripts.files.digests import canonical_json, digest
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.records import ProvenanceError
from workflow_scripts.policy.manifest import ADAPTER
from workflow_scripts.reporting.wording import HEADS
from workflow_scripts.running.mismatches import other_settings
from workflow_scripts.running.provenance import read_sidecar, verify_chain

EXPECTED = ROOT / "tests" / "expected"
RUN, VERIFIED = "run.json", "verified.yaml"
# Columns that tell the rows of a table apart.
KEYS = {name: (*heads, "seed") for name, heads in HEADS.items()}
KEYS |= {"comparisons": ("claim", "test_data", "against", "tie", "seed")}
PROSE = "notes"  # column whose words are not compared
KINDS = {"policies": "adapters", "rollouts": "rollouts", "scores": "scores"}

Processor = dict[str, str]  # name, vendor and instructions, as sidecars record them


class Difference(NamedTuple):
    """A cell of a table with another text than the expected one; None where there is no such cell."""

    table: str
    row: str
    column: str
    expected: str | None
    found: str | None


class Comparison(NamedTuple):
    """Where results differ from an expectation."""

    expectation: Path
    """Its folder."""
    cells: list[Difference]
    files: list[str]
    """Adapters, rollouts and scores with other bytes, relative to the results folder."""
    processors: list[Processor]
    """Those that made the results."""

    def summary(self) -> str:
        """Say in one line whether the tables are the expected ones, and where the first difference is."""
        published = f"the published table ({EXPECTED.relative_to(ROOT) / self.expectation.name})"
        if not self.cells:
            kinds = Counter(KINDS[name.split("/")[0]] for name in self.files)
            counts = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
            return f"equal to {published}" + (f", although files have other bytes: {counts}" if counts else "")
        first = self.cells[0]
        expected, found = ("no such cell" if text is None else text or "an empty one" for text in first[3:])
        count = "1 cell differs" if len(self.cells) == 1 else f"{len(self.cells)} cells differ"
        return (
            f"{count} from {published}, the first in {first.table}.csv, {first.row}, "
            f"{first.column}: expected {expected}, found {found}"
        )


def settings_digest(c: Configuration) -> str:
    """Digest of what the stages behind the tables are given: of every key that can change a table, and of no other.

    The configuration must not use own data, whose files it does not know.
    """
    configs: list[StageConfig] = [PrepareBasePolicy.of(c), MakeTables.of(c)]
    for dataset in dict.fromkeys([*c.tracks, *targets.test_sets(c)]):
        configs.append(SynthesizeDataset.of(c, dataset))
        for split in get_args(Split) if c.trains() else ("test",):
            configs += [ReadAnnotations.of(c, dataset, split), SelectSubset.of(c, dataset, split)]
    configs += [TrainGrpo.of(c, track, seed) for track in c.tracks for seed in c.seeds if c.trains()]
    for case in targets.measured(c):
        configs += [ScoreRollouts.of(c, *case), MeasureAccuracy.of(c, *case)]
        blocks = [(shard, block) for shard in targets.shards(c, case[2]) for block in range(c.rollouts.blocks)]
        configs += [GenerateRollouts.of(c, *case, *block) for block in blocks]
    return digest(canonical_json([[config.stage, config.model_dump(mode="json")] for config in configs]))


def expectation_of(c: Configuration) -> Path | None:
    """Folder of the expectation that belongs to a configuration, None where there is none."""
    if c.uses_own_data():
        return None
    known = {read_run(run.parent)["settings"]: run.parent for run in EXPECTED.glob(f"*/{RUN}")}
    return known.get(settings_digest(c))


def read_run(expectation: Path) -> dict[str, Any]:
    """Settings, processor and files of an expectation.

    Raises:
        ProvenanceError: run.json cannot be read.
    """
    path = expectation / RUN
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        return {key: run[key] for key in ("settings", "processor", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProvenanceError(f"{path} is not what was committed ({error!r}); restore it with git checkout") from None


def compared_files(c: Configuration) -> list[str]:
    """Adapters, rollouts and scores behind the tables of a configuration, relative to its results folder."""
    adapters = [f"{folder}/{ADAPTER}" for folder in targets.adapter_folders(c)]
    paths = map(Path, adapters + targets.rollout_files(c) + targets.score_files(c))
    return [path.relative_to(c.results).as_posix() for path in paths]


def check_made_with(c: Configuration, results: Path) -> None:
    """Check that the tables and what they were made from are as their stages wrote them, with these settings and code.

    Raises:
        ProvenanceError: a file is missing, is not what its stage wrote, was made from another file than the one that is
            there now, or was made with other settings or code.
    """
    chain: dict[Path, dict[str, Any]] = {}
    for name in ("table1.csv", *compared_files(c)):
        verify_chain(results / name, chain)
    for path, sidecar in chain.items():
        if reasons := other_settings(c, sidecar):
            raise ProvenanceError(
                f"{path} is not a result of this configuration and code ({reasons[0]}); give its changes by "
                "--configfile and --config, or run snakemake again"
            )


def file_digests(results: Path, names: Collection[str]) -> dict[str, str]:
    """SHA-256 of files of a results folder by name, as their sidecars record it.

    Raises:
        ProvenanceError: one has no sidecar.
    """
    return {name: read_sidecar(results / name)["outputs"][Path(name).name]["sha256"] for name in names}


def processors_of(results: Path, names: Collection[str]) -> list[Processor]:
    """Processors that made the tables and these files of a results folder, each once."""
    found: list[Processor] = []
    for name in ("table1.csv", *names):
        processor = read_sidecar(results / name)["processor"]
        if processor not in found:
            found.append(processor)
    return found


def cells(path: Path) -> dict[tuple[str, str], str]:
    """Text of every cell of a table by row and column, without notes; the row is named by its key columns.

    Raises:
        ProvenanceError: it cannot be read, or two rows have the same keys.
    """
    found: dict[tuple[str, str], str] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, restkey="more", strict=True):
                name = " | ".join(row[key] for key in KEYS[path.stem] if row[key])
                if (name, KEYS[path.stem][0]) in found:
                    raise ValueError(f"two rows are {name}")
                found |= {(name, column): str(text) for column, text in row.items() if column != PROSE}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise ProvenanceError(f"{path} is not a table of this workflow ({error!r}); make it again") from None
    return found


def differing_cells(results: Path, expectation: Path) -> list[Difference]:
    """Cells of the tables whose text differs, in the order of the expected tables; cells only in results come last."""
    found = []
    for table in KEYS:
        expected, actual = cells(expectation / f"{table}.csv"), cells(results / f"{table}.csv")
        for cell in expected | actual:
            if expected.get(cell) != actual.get(cell):
                found.append(Difference(table, *cell, expected.get(cell), actual.get(cell)))
    return found


def compare(results: Path, expectation: Path) -> Comparison:
    """Compare a finished results folder with an expectation, the tables by their cells and the other files by bytes.

    Raises:
        ProvenanceError: a table cannot be read, or another file has no sidecar.
    """
    expected = read_run(expectation)["files"]
    actual = file_digests(results, expected)
    files = [name for name in expected if actual[name] != expected[name]]
    return Comparison(expectation, differing_cells(results, expectation), files, processors_of(results, expected))


def is_verified(processor: Mapping[str, str], folder: Path = EXPECTED) -> bool:
    """Whether the expected digits were verified on such a processor: one with all values of a line of verified.yaml."""
    listed = yaml.safe_load((folder / VERIFIED).read_text(encoding="utf-8"))
    return any(line.items() <= processor.items() for line in listed)
