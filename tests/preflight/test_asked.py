"""Made-up questions: as long and as many as planned, with images that items share as in the data."""

from typing import Any

import pytest
from narrow_qwen import narrow

from workflow_scripts.configuration.model import Configuration, Dataset, Split, Track
from workflow_scripts.planning.workload import Questions, questions
from workflow_scripts.policy.prompts import messages
from workflow_scripts.preflight.asked import Asked, asked
from workflow_scripts.preflight.untrained import Source
from workflow_scripts.rollouts.items import Item, anchor_items, pointwise_items
from workflow_scripts.training.items import training_items

PUBLISHED: dict[str, Any] = {"datasets": {name: {"source": "hub"} for name in ("imagereward", "hpsv2")}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Return the bundled policy on synthetic data, and a narrow one on the published data."""
    folder = tmp_path_factory.mktemp("source")
    published = narrow(folder / "model", PUBLISHED)
    return {"bundled": Source.of(Configuration(), folder), "narrow": Source.of(published, folder)}


def made(source: Source, track: Track, test: Dataset, split: Split, n: int) -> tuple[Asked, list[Item], Questions, Any]:
    """Questions, their items as the stages make them, what is planned, and the base policy."""
    c, base = source.configuration, source.base(track)
    planned = questions(c, source.reader, track, test, split)
    found = asked(c, base.config, base.processor, not source.random, test, split, planned, n)
    names = set(found.images.sizes)
    if split != "test":
        items = [item for item, _ in training_items(found.rows, names, base.config.protocol, 0)]
    elif base.config.protocol == "pointwise":
        items = pointwise_items(found.rows, names)
    else:
        items = anchor_items(found.rows, names, 0, c.rollouts.both_orders)
    return found, items, planned, base


@pytest.mark.parametrize("policy", ["bundled", "narrow"])
@pytest.mark.parametrize(
    ("track", "test"), [("imagereward", "imagereward"), ("hpsv2", "hpsv2"), ("hpsv2", "imagereward")]
)
def test_questions_are_as_long_as_planned(sources: dict[str, Source], policy: str, track: Track, test: Dataset) -> None:
    found, items, planned, base = made(sources[policy], track, test, "test", 24)
    lengths = []
    for item in items:
        chat = messages(base.config.template, item.prompt)
        text = base.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        images = [found.images.read(name) for name in item.image_ids]
        assert [image.size for image in images] == [found.images.sizes[name] for name in item.image_ids]
        lengths.append(len(base.processor(text=[text], images=[images])["input_ids"][0]))
    assert sum(lengths) / len(lengths) == pytest.approx(planned.mean, rel=0.03)


@pytest.mark.parametrize("policy", ["bundled", "narrow"])
def test_items_share_images_as_in_the_data(sources: dict[str, Source], policy: str) -> None:
    """A test prompt has its anchor in all its questions, a validation prompt of HPDv2 six pairs of four images."""
    source = sources[policy]
    found, items, planned, _ = made(source, "hpsv2", "hpsv2", "test", 32)
    each = round(planned.items / planned.prompts)
    assert each in (8, 9) and 32 <= len(items) < 32 + each
    assert len({name for item in items[:each] for name in item.image_ids}) == each + 1
    found, items, _, _ = made(source, "hpsv2", "hpsv2", "validation", 32)
    assert len(items) == 32  # 5 prompts of 6 pairs, and 2 of another one
    assert len({name for item in items[:6] for name in item.image_ids}) == 4
    found, items, _, _ = made(source, "hpsv2", "hpsv2", "train", 10)
    assert len(items) == len(found.rows) == 10
    assert len({name for item in items for name in item.image_ids}) == 20
    _, items, planned, _ = made(source, "imagereward", "imagereward", "validation", 30)
    assert 30 <= len(items) < 30 + round(planned.items / planned.prompts)


def test_images_and_texts_differ(sources: dict[str, Source]) -> None:
    """Equal ones would be computed once."""
    for source in sources.values():
        found, items, *_ = made(source, "hpsv2", "hpsv2", "train", 12)
        assert len({found.images.read(name).tobytes() for name in found.images.sizes}) == 24
        assert len({item.prompt for item in items}) > 10
        assert found.images.read("0003-1").tobytes() == found.images.read("0003-1").tobytes()
