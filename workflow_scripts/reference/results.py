"""The tables of README.md and docs/results.md, made from the committed ones; a test holds them together.

python -m workflow_scripts.reference.results

A part of a page between <!-- NAME --> and <!-- /NAME --> is written by the function NAME of `PARTS`. It stays as it is
where its expectation is not there.
"""

import csv
from collections.abc import Callable
from pathlib import Path

from tabulate import tabulate

from workflow_scripts.files.paths import ROOT
from workflow_scripts.reporting.expectation import EXPECTED
from workflow_scripts.reporting.wording import number, with_interval
from workflow_scripts.scoring.accuracies import LABELS

PAGES = ("README.md", "docs/results.md")
PROTOCOLS = {"imagereward": "ratings", "hpsv2": "pairs"}

Row = dict[str, str]


def rows(folder: Path, table: str) -> list[Row]:
    """Rows of a table of an expectation."""
    with (folder / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown(shown: list[Row], columns: str) -> str:
    """Rows as a Markdown table; `columns` has l or r for each column."""
    names = {"l": "left", "r": "right"}
    return tabulate(
        shown, headers="keys", tablefmt="pipe", disable_numparse=True, colalign=[names[column] for column in columns]
    )


def table1(folder: Path) -> str:
    """Table 1 in short: accuracies with what they can be compared with."""
    shown = [
        {"training_data": row["training_data"], "against": row["against"]}
        | {f"paper @{k}": number(row[f"mean@{k}_paper"]) for k in (1, 3)}
        | {"ceiling": number(row["ceiling"])}
        | {mean: with_interval(row, mean) for mean in ("mean@1", "mean@3")}
        for row in rows(folder, "table1")
    ]
    return markdown(shown, "llrrrll")


def trained_on(folder: Path) -> str:
    """What the trainings of table 1 were given, in a sentence for each."""
    return "\n".join(
        f"- {row['training_data']}: {int(row['items_seen']):,} of {int(row['items_available']):,} items seen "
        f"({row['epochs']} epochs)"
        for row in rows(folder, "table1")
        if row["against"] == LABELS
    )


def table2(folder: Path) -> str:
    """Table 2: a method in a row, labels and noise-free order side by side, and the ceiling of each as the last row."""
    found = rows(folder, "table2")
    by_method: dict[str, dict[str, Row]] = {}
    for row in found:
        by_method.setdefault(row["method"], {})[row["against"]] = row
    cases = {
        f"{against.removesuffix(' order')}, {mean}": (against, mean)
        for against in dict.fromkeys(row["against"] for row in found)
        for mean in ("mean@1", "mean@3")
    }
    shown = [
        {"method": method, "paper": number(of[LABELS]["paper"])}
        | {title: with_interval(of.get(against, {}), mean) for title, (against, mean) in cases.items()}
        for method, of in by_method.items()
    ]
    ceilings = {row["against"]: number(row["ceiling"]) for row in found}
    shown.append({"method": "Ceiling", "paper": ""} | {title: ceilings[case[0]] for title, case in cases.items()})
    return markdown(shown, "lrllll")


def gains(folder: Path) -> str:
    """Trained minus zero-shot with soft reward at Mean@1: a seed in a column."""
    by_seed: dict[tuple[str, str], Row] = {}
    for row in rows(folder, "comparisons"):
        if row["claim"] == "trained > zero-shot, soft reward, Mean@1" and row["tie"] == "half":
            seed = f"seed {row['seed']}" if row["seed"].isdigit() else row["seed"]
            head = {"": PROTOCOLS[row["test_data"]], "against": row["against"]}
            by_seed.setdefault((row["test_data"], row["against"]), head)[seed] = with_interval(row, "difference")
    shown = list(by_seed.values())
    return markdown(shown, "l" * len(shown[0]))


def failing_claims(folder: Path) -> str:
    """The claims of the paper that do not hold with ties as wrong or as half."""
    judged = [row for row in rows(folder, "comparisons") if row["tie"] in ("wrong", "half")]
    shown = [
        {
            "claim": row["claim"],
            "data": PROTOCOLS[row["test_data"]],
            "against": row["against"],
            "ties": row["tie"],
            "seed": row["seed"],
            "difference": with_interval(row, "difference"),
        }
        for row in judged
        if row["holds"] != "True"
    ]
    counted = f"With ties counted as wrong or as half, {len(judged) - len(shown)} of {len(judged)} rows hold"
    return f"{counted}; these do not:\n\n{markdown(shown, 'l' * 6)}" if shown else f"{counted}."


def trainings(folder: Path) -> str:
    """Validations of every training with their standard errors, the largest KL divergence, and gradient norms."""
    shown = []
    for row in rows(folder, "trainings"):
        of = {name: float(value) for name, value in row.items() if value and name != "track"}
        steps = [name.removesuffix("_se") for name in of if name.endswith("_se")]
        validations = [f"{100 * of[step]:.1f} ± {100 * of[f'{step}_se']:.1f} ({step.split('@')[1]})" for step in steps]
        median, largest = of["median_gradient"], of["largest_gradient"]
        shown.append(
            {"": PROTOCOLS[row["track"]], "seed": row["seed"], "validation (step)": ", ".join(validations)}
            | {"largest KL": f"{of['largest_kl']:.3f}", "median gradient": f"{median:.4f}"}
            | {"largest gradient": f"{largest:.4f}, {largest / median:.1f} ×"}
        )
    return markdown(shown, "lllrrr")


# Name of a part: the expectation that it shows, and its text.
PARTS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "table1": ("default", table1),
    "trained_on": ("default", trained_on),
    "table2": ("default", table2),
    "failing_claims": ("default", failing_claims),
    "gains": ("three_seeds", gains),
    "trainings": ("three_seeds", trainings),
    "failing_claims_of_three_seeds": ("three_seeds", failing_claims),
}


def with_tables(text: str) -> str:
    """A page with its parts made from the expectations that are there."""
    for name, (expectation, part) in PARTS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if (folder := EXPECTED / expectation).is_dir() and begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}{part(folder)}\n{end}{rest.split(end)[1]}"
    return text


def pages_with_tables() -> dict[str, str]:
    """Text of the pages, by path in the repository."""
    return {page: with_tables((ROOT / page).read_text(encoding="utf-8")) for page in PAGES}


if __name__ == "__main__":
    for path, text in pages_with_tables().items():
        (ROOT / path).write_text(text, encoding="utf-8")
