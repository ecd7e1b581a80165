"""The report as one HTML file: what it says, and how its template is filled.

All text that the template is given is escaped: prompts and completions are anyone's. The page may load nothing and run
no script but its own, which its content security policy says to the browser.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from workflow_scripts.configuration.stages import MakeReport
from workflow_scripts.files.instances import instance_name
from workflow_scripts.reporting.cards import Gallery
from workflow_scripts.reporting.drawing import inline_svg
from workflow_scripts.reporting.figures import FIGURES
from workflow_scripts.reporting.jobs import jobs_behind, provenance_table, settings
from workflow_scripts.reporting.wording import (
    HEADS,
    METHODS,
    POLICIES,
    TRAINED_ON,
    dataset_titles,
    number,
    table_titles,
    track_titles,
    with_interval,
)

TEMPLATES = Path(__file__).with_name("templates")
CAPTIONS = Path(__file__).with_name("captions")


def render(content: dict[str, Any]) -> str:
    """The page with this content; every text is escaped, `svg` of a figure must be safe already.

    Raises:
        jinja2.UndefinedError: the template asks for what is not in `content`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template("report.html.jinja")
    return template.render(content, script=Markup(script), script_hash=script_hash)


def accuracy_table(frame: pd.DataFrame, name: str, title: str, ks: list[int]) -> dict[str, Any]:
    """One of the paper's tables for people: its own first columns, then the paper's numbers beside ours."""
    heads = HEADS[name] + (["seed"] if frame["seed"].nunique() > 1 else [])
    papers = {f"mean@{k}_paper": f"paper, Mean@{k}" for k in ks} | {"paper": "paper"}
    papers = {name: text for name, text in papers.items() if name in frame and frame[name].notna().any()}
    amounts = [amount for amount in TRAINED_ON if amount in frame]
    titles = [column.replace("_", " ") for column in heads + amounts]
    rows = [
        [
            *("" if pd.isna(row[head]) else str(row[head]) for head in heads),
            *(number(row[amount], 2 if amount == "epochs" else 0) for amount in amounts),
            *(number(row[paper]) for paper in papers),
            *(with_interval(row, f"mean@{k}") for k in ks),
            number(row["ceiling"]),
            number(row["n_pairs"], 0),
        ]
        for row in frame.to_dict("records")
    ]
    return {
        "title": title,
        "caption": "Accuracy in %, with its interval."
        + (" Items are the images or pairs of the training set; epochs count every item drawn." if amounts else ""),
        "columns": [*titles, *papers.values(), *(f"Mean@{k}" for k in ks), "ceiling", "pairs"],
        "rows": rows,
        "heads": len(heads),
    }


def claims_table(compared: pd.DataFrame, titles: dict[str, str]) -> dict[str, Any]:
    """Every claim of the paper with its difference, by training set and by what it is measured against."""
    chosen = compared[(compared["tie"] == "half") & (compared["seed"].astype(str) == str(compared["seed"].iloc[-1]))]
    cases = list(chosen[["test_data", "against"]].drop_duplicates().itertuples(index=False, name=None))
    cells = {
        (row["claim"], row["test_data"], row["against"]): ("✓ " if row["holds"] else "✗ ")
        + with_interval(row, "difference")
        for row in chosen.to_dict("records")
    }
    claims = list(dict.fromkeys(chosen["claim"]))
    return {
        "lead": "Differences in percentage points, paired over prompts, predicted ties half. "
        "✓: the interval lies above zero. Other tie rules are in comparisons.csv.",
        "caption": f"Differences, {'seed ' if len(set(compared['seed'])) == 1 else ''}{compared['seed'].iloc[-1]}",
        "columns": ["claim", *(f"{titles[test]}, {against}" for test, against in cases)],
        "rows": [[claim, *(cells.get((claim, *case), "") for case in cases)] for claim in claims],
        "heads": 1,
    }


def calibration_table(pairs: pd.DataFrame) -> dict[str, Any]:
    """Brier score and calibration error of every policy."""
    rows = [
        [r["case"], POLICIES[r["policy"]], str(r["rollouts"]), number(r["brier"], 3), number(r["ece"], 3)]
        for r in pairs.drop_duplicates(["case", "policy", "rollouts"]).to_dict("records")
    ]
    return {
        "caption": "Brier score (0.25 for always saying 50 %) and expected calibration error in ten equally wide bins",
        "columns": ["policy of", "policy", "rollouts averaged", "Brier score", "calibration error"],
        "rows": rows,
        "heads": 2,
    }


def read_figures(folder: Path) -> list[dict[str, Any]]:
    """Every figure that has data, as the page wants it."""
    found = []
    for name, plot in FIGURES.items():
        data = folder / f"{name}.csv"
        table = pd.read_csv(data)
        if not table.empty:
            found.append(
                {
                    "name": name,
                    "title": plot.title,
                    "caption": (CAPTIONS / f"{name}.rst").read_text(encoding="utf-8").strip(),
                    "alt": f"{plot.title}. {in_words(table)}",
                    "csv": base64.b64encode(data.read_bytes()).decode(),
                    # Made by matplotlib, which escapes the titles in it.
                    "svg": Markup(inline_svg((folder / f"{name}.svg").read_text(encoding="utf-8"), name)),
                }
            )
    return found


def in_words(table: pd.DataFrame) -> str:
    """What a figure shows in words: the first and the last point of each line."""
    value = next(name for name in ("mean", "value", "share") if name in table)
    percent = 1 if value == "value" or table[value].max() > 1 else 100
    keys = [key for key in ("case", "policy", "method", "rollouts", "source", "when", "metric", "seed") if key in table]
    words = []
    for names, group in table.groupby(keys, sort=False):
        label = ", ".join(str(METHODS.get(str(n), POLICIES.get(str(n), str(n)))) for n in names)
        points = group[value].to_numpy() * percent
        words.append(f"{label}: from {points[0]:.3g} to {points[-1]:.3g}{' %' if percent == 100 else ''}")
    return "; ".join(words) + "."


def content(
    galleries: list[Path], tables: Path, figures: Path, config: MakeReport, sidecars: dict[str, Any]
) -> tuple[dict[str, Any], int]:
    """Everything that the page says, and how many prompts of the galleries found no room.

    Args:
        galleries: of every policy on every test set.
        tables: folder of table1.csv, table2.csv and comparisons.csv.
        figures: folder of the figures.
        config: of the report.
        sidecars: of the jobs that made these files.
    """
    names = {"track": track_titles(config.own_title), "test": dataset_titles(config.own_title)}
    one, two, compared = (pd.read_csv(tables / f"{name}.csv") for name in ("table1", "table2", "comparisons"))
    jobs = jobs_behind(sidecars)
    gallery = Gallery(galleries, names)
    sources, models = sorted(set(one["data_source"])), sorted(set(one["model"]))
    answered = [job["config"] for job in jobs if job["stage"] == "generate_rollouts"]
    seeds, policies = (sorted({str(config[key]) for config in answered}) for key in ("seed", "policy"))
    titles = table_titles("grpo" in policies)
    trained = "before and after GRPO" if len(policies) > 1 else "after GRPO"
    synthetic = "synthetic" in sources
    notes = []
    if synthetic:
        notes.append(
            "These data are synthetic: drawn shapes and simulated annotators, in the layout of the published data. The "
            "paper's numbers stand beside ours to show what belongs where, not to be matched."
        )
    claims = claims_table(compared, names["test"])
    failed = [row[0] for row in claims["rows"] if any(cell.startswith("✗") for cell in row[1:])]
    versions = {f"{name} {version}" for job in jobs for name, version in job["versions"].items()}
    processors = {
        "{name} ({vendor}), {instructions}".format_map(job["processor"]) for job in jobs if "processor" in job
    }
    return {
        "title": "Visual human preferences with reasoning and soft rewards",
        "lead": f"Base policy {', '.join(models)}, data {', '.join(sources)}, seed {', '.join(seeds)}: accuracy "
        f"on human preferences {trained if 'grpo' in policies else 'without training'}, "
        f"{', '.join(f'Mean@{k}' for k in config.report_k)}.",
        "notes": notes,
        "reading": f"Accuracy in %, {config.confidence:.0%} bootstrap interval over prompts. “Labels” are the "
        "annotators' judgements"
        + (
            "; the noise-free order is known only in a synthetic world, and the ceiling is the accuracy of that order."
            if synthetic
            else "."
        ),
        "tables": [
            accuracy_table(table, name, titles[name], config.report_k)
            for name, table in {"table1": one, "table2": two}.items()
            if not table.empty
        ],
        "protocols": sorted(set(one["protocol"])),
        "claims": claims,
        "figures": read_figures(figures),
        "calibration": calibration_table(pd.read_csv(figures / "calibration_pairs.csv")),
        "failing": f"{len(failed)} of {len(claims['rows'])} claims do not hold everywhere: {'; '.join(failed)}."
        if failed
        else "Every claim above holds everywhere.",
        "mistakes": gallery.mistakes(),
        "warnings": [(instance_name(job), text) for job in jobs for text in job["warnings"]],
        "filters": gallery.filters(names),
        "cards": gallery.cards,
        "pictures": gallery.pictures,
        "data": " ".join(
            f"{test}: {source}, {prompts} prompts, {rollouts} rollouts of each item; {forced} % forced to end, "
            f"{missing} % without a valid answer."
            for test, source, prompts, rollouts, forced, missing in one[
                ["test_data", "data_source", "n_prompts", "rollouts", "forced_percent", "missing_answer_percent"]
            ]
            .drop_duplicates("test_data")
            .itertuples(index=False, name=None)
        ),
        "stages": settings(jobs),
        "provenance": provenance_table(jobs),
        "versions": ", ".join(sorted(versions)),
        "processors": "; ".join(sorted(processors)),
    }, gallery.left_out
