"""Make the report: tables, figures, a gallery, settings and provenance in one HTML file that needs nothing else.

python -m workflow_scripts.stages.make_report results/gallery/*/*/seed*/*.parquet --table1 results/table1.csv \
    --figures results/figures/training_curves.csv --page results/report.html --config '{"report_k": [1, 3], …}'
"""

import base64
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from pydantic_settings import CliPositionalArg

from workflow_scripts.configuration.stages import MakeReport
from workflow_scripts.files.instances import INSTANCE_KEYS, flat, instance_name
from workflow_scripts.files.writing import replacing
from workflow_scripts.policy.prompts import CLOSE_THINKING
from workflow_scripts.preferences.schema import read_table
from workflow_scripts.reporting.drawing import METHODS, POLICIES, inline_svg
from workflow_scripts.reporting.gallery import GALLERY
from workflow_scripts.reporting.page import render
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.running.provenance import read_sidecar, sidecar_path
from workflow_scripts.tracking.stage_run import run_stage

LARGEST_GALLERY = 9_000_000  # characters of the page that pictures and texts of the gallery may take
MISTAKES = 8  # of the gallery that are listed

# First columns of the tables, with their names for people.
TABLE1 = {"training_data": "training data", "test_data": "test data", "against": "against"}
TABLE2 = {"method": "method", "against": "against"}
# Title and caption of each figure.
FIGURES = {
    "training_curves": (
        "Training curves",
        "Reward and its parts are means of each training batch, so they are noisy; the adapter that is used is the one "
        "with the best validation accuracy.",
    ),
    "answers": (
        "Answers before and after training",
        "Shares of the sampled answers; after: the selected adapter. Validation rollouts are of the validation "
        "prompts, test rollouts of all test items. “none”: no valid answer. Of pairs, 1 is the image shown second.",
    ),
    "mean_at_k": (
        "Mean@k",
        "Accuracy over strictly ranked pairs, a predicted tie half, against the number of rollouts averaged and "
        "against the tokens generated for them. Each k averages over all choices of k of the recorded rollouts.",
    ),
    "calibration_pairs": (
        "Reliability of pairs",
        "Of the pairs that are given a probability, how many do people order so? Ten equally wide bins. A policy that "
        "compares gives the probability that the candidate is preferred over its anchor; of one that rates it is the "
        "probability that a rating drawn for one image is higher than one drawn for the other, a tie half.",
    ),
    "calibration_ratings": (
        "Expected and human rating",
        "Mean human rating of the test images in bins of half a point of the expected rating. On the dotted line they "
        "are equal.",
    ),
    "tie_rules": (
        "Tie rules",
        "Mean@1 over strictly ranked pairs with equal scores counted as wrong, half, left out, or right. Sampled "
        "answers tie often, soft rewards hardly ever.",
    ),
    "presentation_order": (
        "Presentation order",
        "Single rollouts: how often they are right by the place of the candidate, and how often the second image is "
        "preferred, by the policy and by people.",
    ),
    "anchor_rank": (
        "Anchor",
        "Accuracy by the human rank of the image that all others of a prompt were compared with.",
    ),
    "rank_distance": (
        "Agreement by rank distance",
        "Accuracy on pairs by the difference of their human ranks; scores are means of all recorded rollouts.",
    ),
    "confidence": (
        "Agreement by score difference",
        "Accuracy on fifths of the pairs, from the smallest to the largest difference of their soft scores.",
    ),
}


class Arguments(StageArguments):
    """Make the report: tables, figures, a gallery, settings and provenance in one HTML file."""

    galleries: CliPositionalArg[list[Input]]
    """Gallery of every policy on every test set."""
    table1: Input
    """Paper's Table 1; the other tables stand beside it."""
    figures: Input
    """Data of the first figure; the others stand beside it."""
    page: Output
    """The report."""
    config: MakeReport
    """Configuration of this stage as JSON."""


# ------------------------------------------------------------------------------------------------------------- tables


def shown(value: Any, digits: int = 1) -> str:
    """A number of a table for people; nothing where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def with_interval(row: Mapping[Any, Any], name: str) -> str:
    """A value of a CSV row with its interval."""
    interval = [shown(row.get(f"{name}_{end}")) for end in ("low", "high")]
    return shown(row.get(name)) + (f" [{interval[0]}, {interval[1]}]" if all(interval) else "")


def accuracy_table(frame: pd.DataFrame, title: str, heads: dict[str, str], ks: list[int]) -> dict[str, Any]:
    """One of the paper's tables for people: its own first columns, then the paper's numbers beside ours."""
    heads = heads | ({"seed": "seed"} if frame["seed"].nunique() > 1 else {})
    papers = {f"mean@{k}_paper": f"paper, Mean@{k}" for k in ks} | {"paper": "paper"}
    papers = {name: text for name, text in papers.items() if name in frame and frame[name].notna().any()}
    columns = [*heads.values(), *papers.values(), *(f"Mean@{k}" for k in ks), "ceiling", "pairs"]
    rows = [
        [
            *(shown(row[name]) for name in heads),
            *(shown(row[name]) for name in papers),
            *(with_interval(row, f"mean@{k}") for k in ks),
            shown(row["ceiling"]),
            shown(row["n_pairs"], 0),
        ]
        for row in frame.to_dict("records")
    ]
    caption = "Accuracy in %, with its interval."
    return {"title": title, "caption": caption, "columns": columns, "rows": rows, "heads": len(heads)}


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
        [r["case"], POLICIES[r["policy"]], shown(r["rollouts"]), shown(r["brier"], 3), shown(r["ece"], 3)]
        for r in pairs.drop_duplicates(["case", "policy", "rollouts"]).to_dict("records")
    ]
    return {
        "caption": "Brier score (0.25 for always saying 50 %) and expected calibration error in ten equally wide bins",
        "columns": ["policy of", "policy", "rollouts averaged", "Brier score", "calibration error"],
        "rows": rows,
        "heads": 2,
    }


# ------------------------------------------------------------------------------------------------------------ figures


def read_figures(folder: Path) -> list[dict[str, Any]]:
    """Every figure that has data, as the page wants it."""
    found = []
    for name, (title, caption) in FIGURES.items():
        data = folder / f"{name}.csv"
        table = pd.read_csv(data)
        if not table.empty:
            found.append(
                {
                    "name": name,
                    "title": title,
                    "caption": caption,
                    "alt": f"{title}. {described(table)}",
                    "csv": base64.b64encode(data.read_bytes()).decode(),
                    # Made by matplotlib, which escapes the titles in it.
                    "svg": Markup(inline_svg((folder / f"{name}.svg").read_text(encoding="utf-8"), name)),
                }
            )
    return found


def described(table: pd.DataFrame) -> str:
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


# ------------------------------------------------------------------------------------------------------------ gallery


class Gallery:
    """Cards of all galleries, as many as the page may hold, and their pictures, each once."""

    def __init__(self, paths: list[Path], names: dict[str, dict[str, str]]) -> None:
        """Read the galleries: prompt by prompt from each in turn, so that none is cut before the others."""
        self.cards: list[dict[str, Any]] = []
        self.pictures: dict[str, str] = {}
        self.left_out = 0
        queues = []
        for path in paths:
            prompts = defaultdict(list)
            for row in read_table(path, GALLERY).to_pylist():
                prompts[row["prompt_id"]].append(row)
            queues.append(list(prompts.values()))
        size = 0
        for turn in range(max(map(len, queues))):
            for rows in (queue[turn] for queue in queues if turn < len(queue)):
                pictures = {hashlib.sha256(r["image"]).hexdigest()[:12]: data_uri(r["image"]) for r in rows}
                size += sum(len(uri) for name, uri in pictures.items() if name not in self.pictures)
                size += sum(1500 + len(rollout["text"]) for row in rows for rollout in row["rollouts"])
                if size > LARGEST_GALLERY:
                    self.left_out += 1
                    continue
                self.pictures |= pictures
                self.cards.append(card(rows, list(pictures), len(self.cards), names))
        # Thirds among the policies of a training set: those of ratings and of pairs are not on one scale.
        for track in {c["track"] for c in self.cards}:
            own = [c for c in self.cards if c["track"] == track]
            low, high = np.quantile([c["confidence"] for c in own], [1 / 3, 2 / 3])
            for c in own:
                c["level"] = "low" if c["confidence"] <= low else "high" if c["confidence"] > high else "middle"

    def mistakes(self) -> list[dict[str, Any]]:
        """Prompts that are mostly wrong, the most confident first."""
        wrong = [c for c in self.cards if c["outcome"] == "wrong"]
        return sorted(wrong, key=lambda c: (c["level"] != "high", -c["confidence"]))[:MISTAKES]

    def filters(self, names: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
        """What the cards can be chosen by; nothing that is the same for all."""
        titles = {
            "outcome": ("agreement with people", {"all": "every pair right", "most": "most pairs right"}),
            "confidence": ("confidence", {"low": "lowest third", "middle": "middle third", "high": "highest third"}),
            "test": ("test set", names["test"]),
            "policy": ("policy", POLICIES),
            "track": ("trained on", names["track"]),
            "seed": ("seed", {}),
        }
        titles["outcome"][1]["wrong"] = "half or more pairs wrong"
        found = []
        for name, (title, words) in titles.items():
            values = {str(c["level" if name == "confidence" else name]) for c in self.cards}
            ordered = [name for name in words if name in values] + sorted(values - words.keys())
            if len(values) > 1 or name in ("outcome", "confidence", "test", "policy"):
                found.append({"name": name, "title": title, "choices": [(v, words.get(v, v)) for v in ordered]})
        return found


def data_uri(image: bytes) -> str:
    """A picture of a gallery as an address."""
    kind = "png" if image.startswith(b"\x89PNG") else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def card(
    rows: list[dict[str, Any]], pictures: list[str], number: int, names: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """A prompt with its images by one policy, as the page wants it."""
    first = rows[0]
    judged = [row for row in rows if row["rollouts"]]
    pairs, right = sum(row["pairs"] for row in rows), sum(row["pairs_right"] for row in rows)
    images = []
    for row in rows:
        picture = hashlib.sha256(row["image"]).hexdigest()[:12]
        human = "no rank" if row["human_rank"] is None else f"#{row['human_rank']:.0f}"
        if row["human_rating"] is not None:
            human += f" (rated {row['human_rating']:.0f})"
        error = "" if row["score_se"] is None else f" ± {row['score_se']:.2f}"
        images.append(
            {
                **{key: row[key] for key in ("width", "height", "right", "human_rank", "predicted_rank", "image_id")},
                "picture": picture,
                "predicted": f"#{row['predicted_rank']}",
                "human": human,
                "score": f"{row['score']:.2f}{error}",
                "alt": f"{first['prompt']}: rank #{row['predicted_rank']} of {len(rows)} by policy, {human} by people",
                "people_alt": f"{first['prompt']}: rank {human} by people",
                "bars": bars(row["rollouts"]),
                "rollouts": [thought(rollout) for rollout in row["rollouts"]],
            }
        )
    ranked = [image for image in images if image["human_rank"] is not None]
    outcome = "unranked" if not pairs else "all" if right == pairs else "most" if 2 * right > pairs else "wrong"
    return {
        **{key: first[key] for key in ("prompt", "track", "policy", "seed", "k")},
        "id": f"prompt-{number + 1}",
        "test": first["dataset"],
        "policy_name": f"{POLICIES[first['policy']]}, {names['track'][first['track']]}, seed {first['seed']}",
        "test_name": f"test set {names['test'][first['dataset']]}",
        # Each pair is counted at both of its images.
        "agreement": f"{right / 2:g} of {pairs // 2} pairs right" if pairs else "no ranked pair",
        "outcome": outcome,
        "confidence": float(np.mean([row["confidence"] for row in judged or rows])),
        "images": sorted(images, key=lambda image: (image["predicted_rank"], image["image_id"])),
        "people": sorted(ranked, key=lambda image: (image["human_rank"], image["image_id"])),
    }


def bars(rollouts: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Mean share in % of each answer, named; of pairs, whichever of the two was shown first."""
    if not rollouts:
        return []
    turned = [r["answer_probabilities"][:: -1 if r["second"] is False else 1] for r in rollouts]
    shares = 100 * np.mean(turned, axis=0)
    names = ["anchor", "this one"] if rollouts[0]["second"] is not None else map(str, range(1, len(shares) + 1))
    return list(zip(names, shares.tolist(), strict=True))


def thought(rollout: dict[str, Any]) -> dict[str, str]:
    """What a rollout thought, and what it said."""
    thinking = rollout["text"].partition(CLOSE_THINKING)[0].strip().removeprefix("<think>").strip()
    answer = rollout["sampled_answer"]
    if rollout["second"] is None:
        said = "no valid answer" if answer is None else f"answer {answer}"
    else:
        place = "second" if rollout["second"] else "first"
        preferred = "no valid answer" if answer is None else f"prefers the {('first', 'second')[answer]}"
        said = f"shown {place}; {preferred}"
    forced = "; thinking cut off" if rollout["forced"] else ""
    return {"thinking": thinking, "said": f"Rollout {rollout['k'] + 1}: {said}; score {rollout['soft']:.2f}{forced}"}


# --------------------------------------------------------------------------------------------------------- provenance


def jobs_behind(sidecars: dict[str, Any]) -> list[dict[str, Any]]:
    """Sidecars of all jobs that these files were made by, directly or not, as far as their files are still there."""
    found: dict[str, dict[str, Any]] = {}
    waiting = list(sidecars.values())
    while waiting:
        sidecar = waiting.pop()
        if sidecar["stage_key"] not in found:
            found[sidecar["stage_key"]] = sidecar
            waiting += [read_sidecar(Path(name)) for name in sidecar["inputs"] if sidecar_path(Path(name)).is_file()]
    return sorted(found.values(), key=lambda sidecar: sidecar["started"])


def settings(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By stage, in the order in which they ran: every key with its value, or its values where jobs differ."""
    stages: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for job in jobs:
        stages[job["stage"]].append(flat(job["config"]))
    found = []
    for name, configs in stages.items():
        keys = list(dict.fromkeys(key for config in configs for key in config))
        rows = []
        for key in keys:
            values = {json.dumps(config[key], ensure_ascii=False): config[key] for config in configs if key in config}
            plain = [value if isinstance(value, str) else text for text, value in values.items()]
            rows.append((key, "\n".join(sorted(plain) if key in INSTANCE_KEYS else plain)))
        found.append({"name": name, "jobs": len(configs), "settings": rows})
    return found


def provenance_table(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """By stage: jobs, time, memory, code; and when and from which commit all of it was made."""
    frame = pd.DataFrame(
        [{k: job[k] for k in ("stage", "seconds", "peak_memory_megabytes", "code_digest")} for job in jobs]
    )
    rows = [
        [
            stage,
            str(len(group)),
            f"{group['seconds'].sum():.0f}",
            str(group["peak_memory_megabytes"].max()),
            ", ".join(sorted(set(group["code_digest"]))),
        ]
        for stage, group in frame.groupby("stage", sort=False)
    ]
    commits = sorted({job["git_commit"] or "no checkout" for job in jobs})
    return {
        "lead": f"{len(jobs)} jobs, {frame['seconds'].sum() / 60:.0f} minutes together, started between "
        f"{jobs[0]['started'][:16]} and {jobs[-1]['started'][:16]} UTC. Commit: {', '.join(commits)}. Each result has "
        "its provenance beside it, in a file that ends in .provenance.json.",
        "caption": "Jobs behind this report",
        "columns": ["stage", "jobs", "seconds", "memory, MB", "code digest"],
        "rows": rows,
        "heads": 1,
    }


def content(arguments: Arguments, sidecars: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Everything that the page says, and how many prompts of the galleries found no room."""
    config = arguments.config
    own = config.own_title or "own data"
    names = {
        "track": {"imagereward": "ImageReward", "hpsv2": "HPSv2", "own": own},
        "test": {"imagereward": "ImageReward", "hpsv2": "HPDv2", "own": own},
    }
    folder = arguments.table1.parent
    one, two, compared = (pd.read_csv(folder / f"{name}.csv") for name in ("table1", "table2", "comparisons"))
    figures = arguments.figures.parent
    jobs = jobs_behind(sidecars)
    gallery = Gallery(arguments.galleries, names)
    sources, models = sorted(set(one["data_source"])), sorted(set(one["model"]))
    seeds = sorted({str(job["config"]["seed"]) for job in jobs if job["stage"] == "train_grpo"})
    synthetic = "synthetic" in sources
    notes = []
    if synthetic:
        notes.append(
            "These data are synthetic: drawn shapes and simulated annotators, in the layout of the published data. The "
            "paper's numbers stand beside ours to show what belongs where, not to be matched."
        )
    tables = [accuracy_table(one, "Table 1: trained policies with soft reward", TABLE1, config.report_k)]
    if not two.empty:
        title = "Table 2: sampled answer against soft reward, ImageReward test set"
        tables.append(accuracy_table(two, title, TABLE2, config.report_k))
    claims = claims_table(compared, names["test"])
    failed = [row[0] for row in claims["rows"] if any(cell.startswith("✗") for cell in row[1:])]
    versions = {f"{name} {version}" for job in jobs for name, version in job["versions"].items()}
    return {
        "title": "Visual human preferences with reasoning and soft rewards",
        "lead": f"Base policy {', '.join(models)}, data {', '.join(sources)}, seed {', '.join(seeds)}: accuracy on "
        f"human preferences before and after GRPO, {', '.join(f'Mean@{k}' for k in config.report_k)}.",
        "notes": notes,
        "reading": f"Accuracy in %, {config.confidence:.0%} bootstrap interval over prompts. “Labels” are the "
        "annotators' judgements"
        + (
            "; the noise-free order is known only in a synthetic world, and the ceiling is the accuracy of that order."
            if synthetic
            else "."
        ),
        "tables": tables,
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
    }, gallery.left_out


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    with run_stage(arguments) as run:
        filled, left_out = content(arguments, run.inputs)
        if left_out:
            run.warn(f"{left_out} prompts of the galleries find no room in the report; the files have them all")
        text = render(filled)
        with replacing(arguments.page) as temporary:
            temporary.write_text(text, encoding="utf-8")
        run.metrics({"gallery_prompts": len(filled["cards"]), "megabytes": len(text.encode()) / 1e6})


if __name__ == "__main__":
    main()
