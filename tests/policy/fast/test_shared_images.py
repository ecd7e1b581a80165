"""Preprocessing of each image once against the processor's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from workflow_scripts.configuration.model import Configuration
from workflow_scripts.configuration.stages import ModelConfig
from workflow_scripts.policy.fast.enable import process_images_once
from workflow_scripts.policy.fast.shared_images import ImagesOnce
from workflow_scripts.policy.loading import load_processor


@pytest.fixture
def processors(base_manifest: Any) -> tuple[Any, Any]:
    """The plain processor, and the one that does each image once."""
    plain, once = (load_processor(base_manifest, ModelConfig.of(Configuration(), "hpsv2")) for _ in range(2))
    process_images_once(once)
    return plain, once


@pytest.mark.parametrize("rows", [[[0]] * 4, [[0, 1], [2, 0], [0, 1], [1, 1]], [[0, 1], [2, 3]]])
def test_patches_and_grids_are_the_plain_ones_to_the_bit(processors: tuple[Any, Any], rows: list[list[int]]) -> None:
    noise = torch.Generator().manual_seed(0)
    sizes = [(60, 80), (80, 60), (60, 80), (200, 30)]
    pictures = [
        Image.fromarray(torch.randint(256, (*size, 3), dtype=torch.uint8, generator=noise).numpy()) for size in sizes
    ]
    images = [[pictures[i] for i in row] for row in rows]
    text = ["<|vision_start|><|image_pad|><|vision_end|>" * len(row) + "a red circle" for row in rows]
    done: list[int] = []
    inner = processors[1].image_processor._preprocess
    processors[1].image_processor._preprocess = lambda given, **kwargs: (
        done.append(len(given)) or inner(given, **kwargs)
    )
    expected, found = (p(images=images, text=text, padding=True, return_tensors="pt") for p in processors)
    assert done == [len({i for row in rows for i in row})]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_it_is_saved_as_the_plain_one(processors: tuple[Any, Any], tmp_path: Path) -> None:
    for name, processor in zip(("plain", "once"), processors, strict=True):
        processor.save_pretrained(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "once").iterdir())
    for name in names:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert not isinstance(AutoProcessor.from_pretrained(tmp_path / "once").image_processor, ImagesOnce)
