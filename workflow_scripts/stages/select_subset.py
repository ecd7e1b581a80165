"""Select prompts of a split and put them in hash order.

python -m workflow_scripts.stages.select_subset --preferences results/datasets/hpsv2/train/preferences.parquet \
    --test_preferences results/datasets/hpsv2/test/preferences.parquet \
    --subset results/datasets/hpsv2/train/subset.parquet \
    --config '{"dataset": "hpsv2", "split": "train", "seed": 0, "by": "prompt", "fraction": 0.25, "prompts": null,
               "drop_overlap": true}'

Training keeps a fraction. Validation prompts come from the split of the data set or, for HPDv2, from what training
leaves. The test split is kept whole. Prompts that leak from the test split are dropped before the fraction is taken.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from workflow_scripts.configuration.data_stages import SelectSubset
from workflow_scripts.preferences import subsampling
from workflow_scripts.preferences.schema import PREFERENCES, ROW_GROUP, SUBSET, read_table, write_preferences
from workflow_scripts.running.command_line import Input, Output, StageArguments
from workflow_scripts.tracking.stage_run import run_stage


class Arguments(StageArguments):
    """Select prompts of a split and put them in hash order."""

    preferences: Input
    """Canonical annotations of the split; for HPDv2's validation those of its training split."""
    test_preferences: Input | None = None
    """Canonical annotations of the test split, to find leaked prompts."""
    train_preferences: Input | None = None
    """Canonical annotations of the training split, to find leaked prompts of a validation split."""
    subset: Output
    """subset.parquet: the selected rows with their position in the hash order."""
    config: SelectSubset
    """Settings of the split."""


def main() -> None:
    """Run the stage."""
    arguments = Arguments.parse()
    config = arguments.config
    with run_stage(arguments) as run:
        if config.drop_overlap and not arguments.test_preferences:
            raise subsampling.SubsamplingError(
                "drop_overlap needs --test_preferences; give it or set drop_overlap to false"
            )
        table = read_table(arguments.preferences, PREFERENCES)
        texts = normalised_texts(table)
        others = [path for path in (arguments.test_preferences, arguments.train_preferences) if path]
        units = pair_units(table) if config.by == "pair" else None
        selection = subsampling.select(
            config, texts, [normalised_texts(read_table(path, PREFERENCES)) for path in others], units
        )
        if config.split == "validation" and config.prompts and len(selection.prompts) < config.prompts:
            run.warn(f"{config.prompts} validation prompts are asked for, the split has only {len(selection.prompts)}")
        rows = selected_rows(table, selection, units)
        numbered = (row | {"position": position} for position, row in enumerate(rows))
        written = write_preferences(arguments.subset, numbered, SUBSET)
        counts = {
            "prompts": len(texts),
            "duplicate_texts": len(texts) - len(set(texts.values())),
            "overlap_ids": len(selection.leaked.ids),
            "overlap_texts": len(selection.leaked.texts),
            "dropped": len(selection.dropped),
            "kept": len(selection.prompts if selection.pairs is None else selection.pairs),
            "of": selection.of,
        }
        run.metrics({**counts, **{f"selected_{name}": number for name, number in written.items()}})


def selected_rows(
    table: pa.Table, selection: subsampling.Selection, units: dict[str, list[str]] | None
) -> Iterator[dict[str, Any]]:
    """Stream the selected rows in hash order, with the selected pairs and their images."""
    place = {name: row for row, name in enumerate(table["prompt_id"].to_pylist())}
    places = pa.array([place[name] for name in selection.prompts], pa.int64())
    if units is None or selection.pairs is None:
        return stream_rows(table.take(places))
    mask = [unit in selection.pairs for of_prompt in units.values() for unit in of_prompt]
    return subsampling.restricted(stream_rows(filter_pairs(table, mask).take(places)))


def stream_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, with only a few at a time as Python objects."""
    for batch in table.to_batches(max_chunksize=ROW_GROUP):
        yield from batch.to_pylist()


def normalised_texts(table: pa.Table) -> dict[str, str]:
    """Return the normalised prompt text by prompt_id."""
    ids, prompts = table["prompt_id"].to_pylist(), table["prompt"].to_pylist()
    return {name: subsampling.normalised(prompt) for name, prompt in zip(ids, prompts, strict=True)}


def pair_units(table: pa.Table) -> dict[str, list[str]]:
    """Name the given pairs of each prompt, in the order of the table."""
    ids, pairs = table["prompt_id"].to_pylist(), table["pairs"].combine_chunks()
    sides = (pairs.flatten().field(side).to_pylist() for side in ("a", "b"))
    units: dict[str, list[str]] = {name: [] for name in ids}
    for row, a, b in zip(pc.list_parent_indices(pairs).to_pylist(), *sides, strict=True):
        units[ids[row]].append(subsampling.pair_unit(ids[row], a, b))
    return units


def filter_pairs(table: pa.Table, mask: list[bool]) -> pa.Table:
    """Keep the given pairs for which the mask, with an entry for each pair of all rows, is true.

    Arrow does it: most pairs of a large table need not become Python objects.
    """
    column, chosen = table["pairs"].combine_chunks(), pa.array(mask, pa.bool_())
    counts = np.bincount(pc.list_parent_indices(column).filter(chosen).to_numpy(), minlength=len(column))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    pairs = pa.ListArray.from_arrays(offsets, column.flatten().filter(chosen))
    return table.set_column(table.column_names.index("pairs"), table.schema.field("pairs"), pairs)


if __name__ == "__main__":
    main()
