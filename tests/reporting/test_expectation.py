"""Committed expectations: the configuration that each belongs to, and that every difference is found and named."""

import csv
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.configuration import overlays
from workflow_scripts.configuration.data_stages import SynthesizeDataset
from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.overlays import read_configuration
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.records import ProvenanceError
from workflow_scripts.reference.expected import configuration_of, write_expectation
from workflow_scripts.reference.reruns import FinishedRun, changing, leaves, other_value
from workflow_scripts.reporting.expectation import (
    EXPECTED,
    KEYS,
    PROSE,
    check_made_with,
    compare,
    compared_files,
    differing_cells,
    expectation_of,
    is_verified,
    settings_digest,
)
from workflow_scripts.running.code_digest import code_digest
from workflow_scripts.running.provenance import read_sidecar, sidecar_path

NAMES = sorted(path.parent.name for path in EXPECTED.glob("*/run.json"))
AMD = {"name": "zen3", "vendor": "AuthenticAMD", "instructions": "avx2"}
Finished = tuple[Configuration, Path]


def table_rows(path: Path) -> list[list[str]]:
    """Lines of a table, the heads first."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def write_rows(path: Path, rows: list[list[str]]) -> None:
    """Write lines of a table."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


@pytest.fixture
def expectation(finished: Finished, tmp_path: Path) -> Path:
    """Return the expectation that was written from the finished results."""
    write_expectation(*finished, tmp_path / "expected")
    return tmp_path / "expected"


# ------------------------------------------------------------------------------------------------- what belongs to what


def test_the_default_and_the_test_have_an_expectation() -> None:
    assert {"default", "test"} <= set(NAMES) <= {"default", "test", "three_seeds"}


@pytest.mark.parametrize("name", NAMES)
def test_an_expectation_belongs_to_the_configuration_that_it_is_named_after(name: str) -> None:
    configuration = configuration_of(name)
    assert expectation_of(configuration) == EXPECTED / name, f"it is stale; run `make expected NAME={name}`"
    recorded = json.loads((EXPECTED / name / "run.json").read_text(encoding="utf-8"))
    assert sorted(recorded["files"]) == sorted(compared_files(configuration))


def test_a_configuration_belongs_to_none_where_a_table_would_change() -> None:
    for change in ({"scoring": {"report_k": [1, 2]}}, {"seeds": [5]}, {"policy": {"source": "cold_start"}}):
        assert expectation_of(read_configuration([], change)) is None
    assert expectation_of(read_configuration([ROOT / "configs/own.yaml"])) is None
    assert expectation_of(read_configuration([ROOT / "configs/paper.yaml"])) is None


def test_exactly_the_keys_that_rerun_the_tables_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/reruns.md has what `snakemake -n` says of each key; the folders alone make tables at another place."""
    monkeypatch.setattr(overlays, "_read", cache(overlays._read))
    page = (ROOT / "docs/reruns.md").read_text(encoding="utf-8").split("\n## ")[1]
    heads, _, *lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    column = [head.replace("<br>", " ").strip() for head in heads].index("make tables")
    reruns = {key: bool(line[column].strip()) for line in lines for key in re.findall(r"`([\w.]+)`", line[0])}
    run = FinishedRun()
    before, decided = settings_digest(run.configuration), 0
    for key, field, value in leaves(run.configuration):
        other = other_value(run, key, field.annotation, value)
        if key in reruns and key not in ("results", "downloads") and other is not None:
            changed = run.changed(changing(key, other))
            assert (settings_digest(changed) != before) == reruns[key], key
            decided += reruns[key]
        elif key in ("results", "downloads"):
            assert settings_digest(run.changed(changing(key, other))) == before
    assert decided > 50


# --------------------------------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("name", NAMES)
def test_key_columns_tell_the_rows_apart(name: str) -> None:
    for table, keys in KEYS.items():
        heads, *rows = table_rows(EXPECTED / name / f"{table}.csv")
        named = {tuple(row[heads.index(key)] for key in keys) for row in rows}
        assert len(named) == len(rows) > 0


def test_equal_results_are_equal(finished: Finished, expectation: Path) -> None:
    comparison = compare(finished[1], expectation)
    assert (comparison.cells, comparison.files, comparison.processors) == ([], [], [AMD])
    assert comparison.summary() == "equal to the published table (tests/expected/expected)"


PLACES = [
    (table, row, column)
    for table, keys in KEYS.items()
    for row, line in enumerate(table_rows(EXPECTED / "test" / f"{table}.csv"))
    for column, _ in enumerate(line)
    if row and table_rows(EXPECTED / "test" / f"{table}.csv")[0][column] not in (*keys, PROSE)
]


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from(PLACES), min_size=1, max_size=12))
def test_exactly_the_changed_cells_are_found_and_named(
    tmp_path_factory: pytest.TempPathFactory, places: set[tuple[str, int, int]]
) -> None:
    results = tmp_path_factory.mktemp("results")
    changed = set()
    for table, keys in KEYS.items():
        heads, *rows = table_rows(EXPECTED / "test" / f"{table}.csv")
        for row, line in enumerate(rows, 1):
            name = " | ".join(filter(None, (line[heads.index(key)] for key in keys)))
            for column, text in enumerate(line):
                if (table, row, column) in places:
                    line[column] = text + "1"
                    changed.add((table, name, heads[column], text, text + "1"))
        write_rows(results / f"{table}.csv", [heads, *rows])
    assert len(changed) == len(places)
    assert {tuple(cell) for cell in differing_cells(results, EXPECTED / "test")} == changed


@pytest.mark.parametrize("table", KEYS)
def test_a_row_or_a_column_that_only_one_table_has(table: str, finished: Finished, expectation: Path) -> None:
    path = finished[1] / f"{table}.csv"
    heads, *rows = table_rows(path)
    write_rows(path, [heads, *rows[:-1]])
    missing = differing_cells(finished[1], expectation)
    compared = dict(zip(heads, rows[-1], strict=True))
    compared.pop(PROSE, None)
    assert {cell.column: cell.expected for cell in missing} == compared and {cell.found for cell in missing} == {None}
    write_rows(path, [[*heads, "more"], *([*row, "x"] for row in rows)])
    more = differing_cells(finished[1], expectation)
    assert [cell[2:] for cell in more] == [("more", None, "x")] * len(rows)
    write_rows(path, [heads, *reversed(rows)])
    assert differing_cells(finished[1], expectation) == []


def test_other_words_in_notes_are_no_difference(finished: Finished, expectation: Path) -> None:
    path = finished[1] / "table1.csv"
    heads, *rows = table_rows(path)
    for row in rows:
        row[heads.index(PROSE)] = "in other words"
    write_rows(path, [heads, *rows])
    assert differing_cells(finished[1], expectation) == []


@pytest.mark.parametrize("broken", ["", "{", "{}", "[]", '{"settings": "s"}'])
def test_an_expectation_that_cannot_be_read_is_named(broken: str, finished: Finished, expectation: Path) -> None:
    (expectation / "run.json").write_text(broken)
    with pytest.raises(ProvenanceError, match=r"expected/run\.json is not what was committed"):
        compare(finished[1], expectation)


@pytest.mark.parametrize("break_it", [Path.unlink, lambda path: path.write_text("a,b\n1,2\n")])
def test_a_table_that_cannot_be_read_is_named(
    break_it: Callable[[Path], None], finished: Finished, expectation: Path
) -> None:
    break_it(expectation / "table2.csv")
    with pytest.raises(ProvenanceError, match=r"expected/table2\.csv is not a table"):
        compare(finished[1], expectation)


def test_two_rows_with_equal_keys_are_refused(finished: Finished, expectation: Path) -> None:
    path = finished[1] / "table1.csv"
    heads, first, *rows = table_rows(path)
    write_rows(path, [heads, [*first[:-1], "another"], first, *rows])
    with pytest.raises(ProvenanceError, match=r"table1\.csv.*two rows are ImageReward \| ImageReward \| labels \| 0"):
        compare(finished[1], expectation)


def test_the_summary_names_the_first_difference(finished: Finished, expectation: Path) -> None:
    path = finished[1] / "table1.csv"
    heads, *rows = table_rows(path)
    mean = heads.index("mean@1")
    before = rows[2][mean]
    rows[2][mean] = "12.34"
    rows[3][mean + 1] = ""
    write_rows(path, [heads, *rows])
    assert compare(finished[1], expectation).summary() == (
        "2 cells differ from the published table (tests/expected/expected), the first in table1.csv, "
        f"HPSv2 (25% subset) | HPDv2 | labels | 0, mean@1: expected {before}, found 12.34"
    )


# ----------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("policies/hpsv2/*/adapter_model.safetensors", "1 adapters"),
        ("scores/*/grpo/**/*.parquet", "3 scores"),
        ("**/*0000-0000.parquet", "5 rollouts"),
    ],
)
def test_other_bytes_with_equal_tables(
    pattern: str, said: str, finished: Finished, expectation: Path, recorded_anew: Callable[[Path], None]
) -> None:
    paths = sorted(finished[1].glob(pattern))
    for path in paths:
        path.write_text("other bytes")
        recorded_anew(path)
    comparison = compare(finished[1], expectation)
    assert sorted(comparison.files) == [path.relative_to(finished[1]).as_posix() for path in paths]
    assert comparison.cells == []
    assert comparison.summary() == (
        f"equal to the published table (tests/expected/expected), although files have other bytes: {said}"
    )


def test_a_file_without_a_sidecar_is_named(finished: Finished, expectation: Path) -> None:
    path = next(finished[1].glob("scores/**/*.parquet"))
    sidecar_path(path).unlink()
    with pytest.raises(ProvenanceError, match=re.escape(str(path))):
        compare(finished[1], expectation)


def test_results_of_other_settings_or_code_are_refused(finished: Finished) -> None:
    configuration, results = finished
    check_made_with(configuration, results)
    other = read_configuration(
        [ROOT / "configs/test.yaml"], {"results": str(results), "training": {"hpsv2": {"beta": 0.5}}}
    )
    with pytest.raises(ProvenanceError, match=r"hpsv2/seed0/adapter.*training\.beta = .*now 0\.5"):
        check_made_with(other, results)
    path = sidecar_path(results / "table1.csv")
    path.write_text(re.sub(r'"code_digest": "\w+"', '"code_digest": "other"', path.read_text()))
    with pytest.raises(ProvenanceError, match=r"table1.*other code of make_tables"):
        check_made_with(configuration, results)


def test_everything_that_the_tables_were_made_from_is_checked(
    finished: Finished, with_sidecar: Callable[..., None], recorded_anew: Callable[[Path], None]
) -> None:
    configuration, results = finished
    data, table = results / "dataset.json", sidecar_path(results / "table1.csv")

    def make_data(seed: int) -> None:
        world = {"datasets": {"imagereward": {"synthetic": {"seed": seed}}}}
        config = SynthesizeDataset.of(read_configuration([ROOT / "configs/test.yaml"], world), "imagereward")
        code = code_digest(config.stage, config.code_engine)
        with_sidecar(data, stage=config.stage, config=config.model_dump(mode="json"), code_digest=code)
        made_from = {str(data): read_sidecar(data)["outputs"][data.name]["sha256"]}
        table.write_text(json.dumps(json.loads(table.read_text()) | {"inputs": made_from}))

    data.write_text("data")
    make_data(0)
    check_made_with(configuration, results)
    make_data(1)
    with pytest.raises(ProvenanceError, match=r"dataset\.json is not a result of this .*seed = 1, now 0"):
        check_made_with(configuration, results)
    make_data(0)
    data.write_text("data made anew on another machine")
    recorded_anew(data)
    with pytest.raises(ProvenanceError, match=r"table1\.csv was made from another .*dataset\.json"):
        check_made_with(configuration, results)


# ------------------------------------------------------------------------------------------------------ the processors


def test_every_processor_that_took_part_is_named_once(finished: Finished, expectation: Path) -> None:
    path = sidecar_path(next(finished[1].glob("policies/hpsv2/*/*.safetensors")))
    path.write_text(path.read_text().replace("AuthenticAMD", "GenuineIntel"))
    assert compare(finished[1], expectation).processors == [AMD, AMD | {"vendor": "GenuineIntel"}]


@pytest.mark.parametrize(
    ("vendor", "name", "instructions", "verified"),
    [
        ("AuthenticAMD", "zen3", "avx2", True),
        ("AuthenticAMD", "zen4", "avx2", True),
        ("AuthenticAMD", "zen3", "native", False),
        ("GenuineIntel", "haswell", "avx2", True),
        ("GenuineIntel", "skylake", "avx2", False),
        ("Apple", "m1", "native", False),
    ],
)
def test_a_processor_is_verified_if_a_line_fits_it(
    vendor: str, name: str, instructions: str, verified: bool, tmp_path: Path
) -> None:
    lines = [{"vendor": "AuthenticAMD", "instructions": "avx2"}]
    lines.append({"vendor": "GenuineIntel", "name": "haswell", "instructions": "avx2"})
    (tmp_path / "verified.yaml").write_text(yaml.safe_dump(lines))
    assert is_verified({"vendor": vendor, "name": name, "instructions": instructions}, tmp_path) == verified


def test_committed_digits_come_from_verified_processors() -> None:
    for name in NAMES:
        assert is_verified(json.loads((EXPECTED / name / "run.json").read_text(encoding="utf-8"))["processor"])
