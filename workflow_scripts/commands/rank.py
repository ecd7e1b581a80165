"""Rank your own images for a prompt by a trained policy: a table here, a CSV, JSON lines and a page in files.

python -m workflow_scripts rank --prompt "two red circles" one.png two.jpg folder/
python -m workflow_scripts rank --table prompts.csv --policy results/policies/hpsv2/seed0 --k 5 --both_orders

The table has the columns prompt and path (relative to the table). After a kill the same command goes on where it was.
Exit codes: 0 ranked, 1 nothing to rank or a policy that cannot be used (one line says what to do), 2 wrong arguments.
"""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from workflow_scripts.running.command_line import tell_briefly
from workflow_scripts.running.redacted_output import redact_output

SHOWN = 40  # rows of the table in the terminal; the files have all


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m workflow_scripts rank",
        description="Rank images for a prompt by a trained policy, the best first, with its reasoning.",
        epilog='example: python -m workflow_scripts rank --prompt "two red circles" *.png',
    )
    what = made.add_argument_group("what to rank: --prompt with images, or --table")
    what.add_argument("images", nargs="*", type=Path, help="image files, or folders of them, for --prompt")
    what.add_argument("--prompt", help="text that the images were made for")
    what.add_argument("--table", type=Path, help="CSV with the columns prompt and path (relative to the CSV)")
    made.add_argument(
        "--policy", type=Path, help="folder of a trained adapter (default: the only one in results/policies/)"
    )
    made.add_argument("--zero_shot", action="store_true", help="leave the adapter out: the base policy answers")
    made.add_argument("--base", type=Path, help="folder of the base policy, if it is no longer where it was")
    made.add_argument("--device", choices=["cpu", "cuda"], help="where to run (default: as in the training)")
    made.add_argument("--k", type=positive, default=3, help="rollouts of each question (default: %(default)s)")
    made.add_argument(
        "--both_orders", action="store_true", help="pairwise policies: show every pair both ways and average"
    )
    made.add_argument("--seed", type=int, default=0, help="seed of the rollouts and anchors (default: %(default)s)")
    made.add_argument("--batch", type=positive, default=16, help="questions asked together (default: %(default)s)")
    made.add_argument(
        "--output", type=Path, default=Path("ranking"), help="files to write without their ending (default: ranking)"
    )
    return made


def positive(word: str) -> int:
    """A whole number from 1."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word} is less than 1")
    return number


def the_policy(results: Path = Path("results")) -> Path:
    """Folder of the only finished training in a results folder.

    Raises:
        PolicyError: there is none, or a choice.
    """
    from workflow_scripts.policy.manifest import PolicyError
    from workflow_scripts.ranking.judge import trained_policies

    found = trained_policies(results)
    if len(found) == 1:
        return found[0]
    if found:
        raise PolicyError(f"there are {len(found)} policies; choose one: " + ", ".join(f"--policy {p}" for p in found))
    raise PolicyError(
        f"there is no trained policy in {results}/policies; make one with `snakemake --cores all`, or name its folder "
        "by --policy"
    )


def print_ranking(rows: Path, images: int) -> None:
    """Print the first rows of a ranking as a table."""
    import json
    from itertools import groupby, islice

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    with rows.open(encoding="utf-8") as file:
        read: list[dict[str, Any]] = [json.loads(line) for line in islice(file, SHOWN)]
    console = Console()
    for prompt, group in groupby(read, key=lambda row: row["prompt"]):
        table = Table("rank", "score", "±", title=Text(prompt), title_justify="left")
        table.add_column("image", overflow="fold")
        table.add_column("first thought", overflow="fold")
        for row in group:
            thought = row["thoughts"][0]["reasoning"] if row["thoughts"] else "(the anchor)"
            numbers = ["" if row[name] is None else f"{row[name]:.3f}" for name in ("score", "standard_error")]
            table.add_row(str(row["rank"] or "-"), *numbers, Text(row["path"]), Text(row["problem"] or thought))
        console.print(table)
    if images > SHOWN:
        console.print(f"… and {images - SHOWN} more")


def main() -> None:
    """Run the command."""
    redact_output()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.excepthook = tell_briefly
    made = parser()
    arguments = made.parse_args()
    if arguments.table and (arguments.images or arguments.prompt is not None):
        made.error("--table has prompts and images itself; leave out --prompt and images")
    if not arguments.table and (arguments.prompt is None or not arguments.images):
        made.error('give --prompt "…" with images or folders of them, or --table prompts.csv')
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from workflow_scripts.ranking.listing import listed_files, listed_table

    listed = listed_table(arguments.table) if arguments.table else listed_files(arguments.images, arguments.prompt)
    from transformers.utils.logging import disable_progress_bar

    from workflow_scripts.ranking.judge import Judge
    from workflow_scripts.ranking.ranked_files import Outputs, rank_files

    disable_progress_bar()  # of loading weights
    warnings.filterwarnings("ignore", category=FutureWarning)  # what libraries tell their developers
    judge = Judge.load(
        arguments.policy or the_policy(),
        arguments.k,
        both_orders=arguments.both_orders,
        seed=arguments.seed,
        batch=arguments.batch,
        zero_shot=arguments.zero_shot,
        base=arguments.base,
        device=arguments.device,
    )
    outputs = Outputs(*(Path(f"{arguments.output}.{ending}") for ending in ("csv", "jsonl", "html")))
    counts = rank_files(judge, listed, outputs)
    print_ranking(outputs.rows, counts["images"])
    print(f"images: {counts['images']}, prompts: {counts['prompts']}; written: {', '.join(map(str, outputs))}")
    if counts["without_score"]:
        print(f"{counts['without_score']} without a score; the column `problem` says why", file=sys.stderr)
    if counts["without_score"] == counts["images"]:
        sys.exit("error: no image could be ranked; the column `problem` says why")


if __name__ == "__main__":
    main()
