"""The parts of pages that are made from committed tables."""

import itertools
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest

from workflow_scripts.reference import results
from workflow_scripts.reference.results import PAGES, PARTS, with_tables
from workflow_scripts.reporting.expectation import EXPECTED
from workflow_scripts.scoring.pair_accuracy import TieRule

DEFAULT = EXPECTED / "default"
TIES = get_args(TieRule)


def parsed(markdown: str) -> pd.DataFrame:
    """A Markdown table as texts."""
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    return pd.DataFrame(rows, columns=heads)


def shown(row: "pd.Series[float]", name: str) -> str:
    """A value with its interval, as pages write it."""
    return f"{row[name]:.1f} [{row[f'{name}_low']:.1f}, {row[f'{name}_high']:.1f}]"


def test_table1_has_every_row_with_its_numbers() -> None:
    made, table = parsed(results.table1(DEFAULT)), pd.read_csv(DEFAULT / "table1.csv")
    assert made["training_data"].tolist() == table["training_data"].tolist()
    assert made["against"].tolist() == table["against"].tolist()
    for mean in ("mean@1", "mean@3"):
        assert made[mean].tolist() == [shown(row, mean) for _, row in table.iterrows()]
    assert pd.to_numeric(made["paper @3"]).equals(table["mean@3_paper"].round(1))
    assert pd.to_numeric(made["ceiling"]).equals(table["ceiling"].round(1))


def test_table2_has_labels_and_noise_free_order_side_by_side() -> None:
    made, table = parsed(results.table2(DEFAULT)).set_index("method"), pd.read_csv(DEFAULT / "table2.csv")
    for _, row in table[table["method"] != "Single human"].iterrows():
        against = row["against"].removesuffix(" order")
        for mean in ("mean@1", "mean@3"):
            assert made.loc[row["method"], f"{against}, {mean}"] == shown(row, mean)
    assert made.index.tolist() == [*dict.fromkeys(table["method"]), "Ceiling"]
    assert made.loc["Ceiling", "noise-free, mean@1"] == "100.0"
    human = table.loc[table["method"] == "Single human", "mean@1"].item()
    assert made.loc["Single human"].tolist()[1:] == [f"{human:.1f}", "", "", ""]


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """Return a folder with comparisons of two seeds and pooled."""
    methods, seeds = ("soft reward", "sampled answer"), {"0": 2.0, "1": 3.0, "pooled": 4.0}
    rows = []
    for method, data, tie, seed in itertools.product(methods, ("imagereward", "hpsv2"), TIES, seeds):
        fails = (method, data, tie, seed) == ("sampled answer", "hpsv2", "wrong", "1")
        row = {"claim": f"trained > zero-shot, {method}, Mean@1", "test_data": data, "against": "labels", "tie": tie}
        low = -1.0 if fails else 1.0
        row |= {"seed": seed, "difference": seeds[seed], "difference_low": low, "difference_high": 9.0}
        rows.append(row | {"holds": not fails})
    pd.DataFrame(rows).to_csv(tmp_path / "comparisons.csv", index=False)
    return tmp_path


def test_gains_have_a_seed_in_a_column(seeds: Path) -> None:
    made = parsed(results.gains(seeds))
    assert made.columns.tolist() == ["", "against", "seed 0", "seed 1", "pooled"]
    assert made.iloc[:, 0].tolist() == ["ratings", "pairs"]
    assert made.iloc[1, 2:].tolist() == ["2.0 [1.0, 9.0]", "3.0 [1.0, 9.0]", "4.0 [1.0, 9.0]"]


def test_claims_that_fail_are_listed_and_the_others_counted(seeds: Path) -> None:
    said = results.failing_claims(seeds)
    first, table = said.split("\n\n")
    assert first == "With ties counted as wrong or as half, 23 of 24 rows hold; these do not:"
    (row,) = parsed(table).to_dict("records")
    assert row["claim"] == "trained > zero-shot, sampled answer, Mean@1"
    assert (row["data"], row["ties"], row["seed"]) == ("pairs", "wrong", "1")
    assert row["difference"] == "3.0 [-1.0, 9.0]"
    frame = pd.read_csv(seeds / "comparisons.csv").assign(holds=True)
    frame.to_csv(seeds / "comparisons.csv", index=False)
    assert results.failing_claims(seeds) == "With ties counted as wrong or as half, 24 of 24 rows hold."


def test_trainings_are_shown_by_what_makes_them_stable(tmp_path: Path) -> None:
    (tmp_path / "trainings.csv").write_text(
        "track,seed,largest_kl,median_gradient,largest_gradient,"
        "validation@0,validation@0_se,validation@40,validation@40_se,validation@50,validation@50_se\n"
        "hpsv2,1,0.0214,0.005,0.0212,0.6211,0.0104,,,0.6553,0.0099\n"
    )
    (row,) = parsed(results.trainings(tmp_path)).to_dict("records")
    assert row == {
        **{"": "pairs", "seed": "1", "validation (step)": "62.1 ± 1.0 (0), 65.5 ± 1.0 (50)"},
        **{"largest KL": "0.021", "median gradient": "0.0050", "largest gradient": "0.0212, 4.2 ×"},
    }


def test_every_part_is_in_one_page_and_only_parts_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pages = [(results.ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    for name in PARTS:
        assert [page.count(f"<!-- {name} -->") for page in pages].count(1) == 1
        assert sum(page.count(f"<!-- /{name} -->") for page in pages) == 1
    text = "before\n<!-- table1 -->\nold | \\1\n<!-- /table1 -->\nafter <!-- other -->"
    made = f"before\n<!-- table1 -->\n{results.table1(DEFAULT)}\n<!-- /table1 -->\nafter <!-- other -->"
    assert with_tables(text) == made == with_tables(made)
    monkeypatch.setattr(results, "EXPECTED", tmp_path)
    assert with_tables(text) == text
