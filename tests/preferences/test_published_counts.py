"""What was read of a published split is compared with what is published of it."""

from typing import Any

from workflow_scripts.configuration.data_stages import PublishedSplit, ReadAnnotations
from workflow_scripts.configuration.model import Dataset, Split, load
from workflow_scripts.configuration.published import PUBLISHED
from workflow_scripts.preferences.published_counts import differences


def published(dataset: Dataset, split: Split, **hub: str) -> PublishedSplit:
    """Return the published counts that the stage is given."""
    c = load({"datasets": {dataset: {"source": "hub", "hub": hub}}})
    found = ReadAnnotations.of(c, dataset, split).published
    assert found is not None
    return found


def test_counts_are_compared_as_exactly_as_they_are_published() -> None:
    assert not differences(published("imagereward", "test"), {"prompts": 466, "images": 2720, "pairs": 7230})
    small = published("imagereward", "train", train_set="1k")
    assert not differences(small, {"prompts": 1000, "images": 6249, "pairs": 17_560})
    assert differences(small, {"images": 6251}) == ["6,251 images, published are 6,200"]
    counts = {"prompts": 107_515, "images": 430_060, "pairs": 645_089}
    assert differences(published("hpsv2", "train"), counts) == ["645,089 pairs, published are 645,090"]


def test_other_published_facts_are_another_configuration_of_the_stage(monkeypatch: Any) -> None:
    hub = load({"datasets": {"hpsv2": {"source": "hub"}}})
    before = ReadAnnotations.of(hub, "hpsv2", "test").canonical()
    monkeypatch.setitem(PUBLISHED["hpsv2"]["counts"]["test"], "pairs", 15_301)
    assert ReadAnnotations.of(hub, "hpsv2", "test").canonical() != before


def test_nothing_is_expected_of_other_data() -> None:
    assert ReadAnnotations.of(load({}), "hpsv2", "train").published is None  # synthetic
    assert ReadAnnotations.of(load({}), "own", "train").published is None
    hub = load({"datasets": {"hpsv2": {"source": "hub"}}})
    assert ReadAnnotations.of(hub, "hpsv2", "validation").published is None  # HPDv2 has none
