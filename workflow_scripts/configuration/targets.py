"""Files that the Snakefile asks for, and the raw files behind them."""

from workflow_scripts.configuration.model import VALIDATION_FROM, Configuration, Dataset, PolicyName, Track
from workflow_scripts.files.paths import ROOT, from_here

FIGURES = (
    *("training_curves", "mean_at_k", "calibration_pairs", "calibration_ratings", "answers", "rank_distance"),
    *("confidence", "tie_rules", "presentation_order", "anchor_rank"),
)


def shards(c: Configuration, test: Dataset) -> list[int]:
    """Numbers of the shards that cover the test prompts."""
    return list(range(-(-getattr(c.datasets, test).test_prompts // c.rollouts.shard_prompts)))


def gallery_shards(c: Configuration, test: Dataset) -> list[int]:
    """Numbers of the shards that hold the prompts of the gallery: the first in hash order."""
    prompts = min(c.report.gallery_prompts, getattr(c.datasets, test).test_prompts)
    return list(range(-(-prompts // c.rollouts.shard_prompts)))


def measured(c: Configuration) -> list[tuple[Track, PolicyName, Dataset, int]]:
    """(track, policy, test, seed) of every accuracy in the tables; cross rows have the policy of table 1 only."""
    same: list[tuple[Track, PolicyName, Dataset]] = [(t, policy, t) for t in c.tracks for policy in c.policies]
    cross: list[tuple[Track, PolicyName, Dataset]] = [(x.track, c.policies[-1], x.test) for x in c.cross_tests]
    return [(*case, seed) for case in same + cross for seed in c.seeds]


def adapter_folders(c: Configuration) -> list[str]:
    """Folders of the policies that are trained, one for each track and seed."""
    tracks = c.tracks if c.trains() else []
    return [f"{c.results}/policies/{track}/seed{seed}" for track in tracks for seed in c.seeds]


def accuracy_files(c: Configuration) -> list[str]:
    """Accuracies for the tables."""
    return [f"{c.results}/accuracy/{t}/{policy}/seed{seed}/{test}.json" for t, policy, test, seed in measured(c)]


def score_files(c: Configuration) -> list[str]:
    """Scores of every policy on every test set of the tables."""
    return [f"{c.results}/scores/{t}/{policy}/seed{seed}/{test}.parquet" for t, policy, test, seed in measured(c)]


def rollout_files(c: Configuration) -> list[str]:
    """Rollouts of every policy on every test set of the tables: all shards and blocks."""
    return [
        f"{c.results}/rollouts/{t}/{policy}/seed{seed}/{test}/{shard:04d}-{block:04d}.parquet"
        for t, policy, test, seed in measured(c)
        for shard in shards(c, test)
        for block in range(c.rollouts.blocks)
    ]


def test_sets(c: Configuration) -> list[Dataset]:
    """Data sets that any policy is tested on."""
    return list(dict.fromkeys(test for _, _, test, _ in measured(c)))


def gallery_files(c: Configuration) -> list[str]:
    """Galleries of every policy on every test set of the tables."""
    return [f"{c.results}/gallery/{t}/{policy}/seed{seed}/{test}.parquet" for t, policy, test, seed in measured(c)]


def dataset_record(c: Configuration, dataset: Dataset) -> str:
    """Record of a raw data set; synthetic and published data have separate folders, and own data stay in place."""
    if dataset == "own":
        return f"{c.results}/datasets/own/dataset.json"
    return f"{c.downloads}/{getattr(c.datasets, dataset).source}/{dataset}/dataset.json"


def own_files(c: Configuration) -> list[str]:
    """The user's table and all other files of its folder, since a changed image makes another data set; else none."""
    if not c.uses_own_data():
        return []
    own = c.datasets.own
    folder = ROOT / own.folder
    images = [
        path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".csv", ".jsonl", ".parquet")
    ]
    return from_here([folder / own.annotations, *sorted(images)])


def ranking_files(c: Configuration) -> list[str]:
    """Ranking of the user's images; none if there are none to rank."""
    endings = ("csv", "jsonl", "html") if c.ranking.images else ()
    return [f"{c.results}/ranking/ranking.{ending}" for ending in endings]


def separate_training_preferences(c: Configuration, dataset: Dataset) -> list[str]:
    """Training annotations that a validation split must not overlap with; none if it is drawn from them."""
    separate = VALIDATION_FROM[dataset] == "validation"
    return [f"{c.results}/datasets/{dataset}/train/preferences.parquet"] if separate else []
