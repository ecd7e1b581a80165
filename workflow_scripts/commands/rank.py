"""`rank`: rank your own images for a prompt by a trained policy."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field
from pydantic_settings import CliPositionalArg

from workflow_scripts.running.arithmetic import pinned
from workflow_scripts.running.command_line import Command, UsageError

SHOWN = 40  # rows of the table in the terminal; the files have all


class Rank(Command):
    """Rank images for a prompt by a trained policy, the best first, with its reasoning.

    Prints a table, and writes a CSV, JSON lines and a page. After a kill the same command goes on where it was.
    Exit status: 0 ranked, 1 nothing to rank or a policy that cannot be used (one line says what to do), 2 wrong
    arguments.

    Examples:
      python -m workflow_scripts rank --prompt "two red circles" one.png two.jpg folder/
      python -m workflow_scripts rank --table prompts.csv --policy results/policies/hpsv2/seed0 -k 5 --both_orders
    """

    images: CliPositionalArg[list[Path]] = Field([])
    """Image files, or folders of them, for --prompt."""
    prompt: str | None = None
    """Text that the images were made for."""
    table: Path | None = None
    """CSV with the columns prompt and path (relative to the CSV), instead of --prompt and images."""
    policy: Path | None = None
    """Folder of a trained adapter (default: the only one in results/policies/)."""
    zero_shot: bool = False
    """Leave the adapter out: the base policy answers."""
    base: Path | None = None
    """Folder of the base policy, if it is no longer where it was."""
    device: Literal["cpu", "cuda"] | None = None
    """Where to run (default: as in the training)."""
    k: int = Field(3, ge=1, validation_alias=AliasChoices("k", "rollouts"))
    """Rollouts of each question."""
    both_orders: bool = False
    """Pairwise policies: show every pair both ways and average."""
    seed: int = 0
    """Seed of the rollouts and anchors."""
    batch: int = Field(16, ge=1)
    """Questions asked together."""
    output: Path = Path("ranking")
    """Files to write, without their ending."""

    def cli_cmd(self) -> None:
        """List the images, load the judge, rank, print."""
        if self.table and (self.images or self.prompt is not None):
            raise UsageError("--table has prompts and images itself; leave out --prompt and images")
        if not self.table and (self.prompt is None or not self.images):
            raise UsageError('give --prompt "…" with images or folders of them, or --table prompts.csv')
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        os.environ.update(pinned("avx2"))  # before the libraries are loaded
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from workflow_scripts.ranking.listing import listed_files, listed_table

        listed = listed_table(self.table) if self.table else listed_files(self.images, self.prompt or "")
        from transformers.utils.logging import disable_progress_bar

        from workflow_scripts.ranking.judge import Judge
        from workflow_scripts.ranking.ranked_files import Outputs, rank_files

        disable_progress_bar()  # of loading weights
        warnings.filterwarnings("ignore", category=FutureWarning)  # libraries address their developers
        judge = Judge.load(
            self.policy or the_policy(),
            self.k,
            both_orders=self.both_orders,
            seed=self.seed,
            batch=self.batch,
            zero_shot=self.zero_shot,
            base=self.base,
            device=self.device,
        )
        outputs = Outputs(*(Path(f"{self.output}.{ending}") for ending in ("csv", "jsonl", "html")))
        counts = rank_files(judge, listed, outputs)
        print_ranking(outputs.rows, counts["images"])
        print(f"images: {counts['images']}, prompts: {counts['prompts']}; written: {', '.join(map(str, outputs))}")
        if counts["without_score"]:
            print(f"{counts['without_score']} without a score; the column `problem` says why", file=sys.stderr)
        if counts["without_score"] == counts["images"]:
            sys.exit("error: no image could be ranked; the column `problem` says why")


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
