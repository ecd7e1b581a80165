"""Small worlds in the published layouts, written once."""

from pathlib import Path

import pytest

from workflow_scripts.configuration.model import Hpdv2World, ImageRewardWorld
from workflow_scripts.preferences.synthetic_layouts import write_hpdv2, write_imagereward


@pytest.fixture(scope="session")
def imagereward_world() -> ImageRewardWorld:
    """Return the size of a small ImageRewardDB."""
    return ImageRewardWorld(
        train_prompts=24, validation_prompts=5, test_prompts=12, prompts_per_archive=10, unreadable_images=2
    )


@pytest.fixture(scope="session")
def hpdv2_world() -> Hpdv2World:
    """Return the size of a small HPDv2."""
    return Hpdv2World(train_prompts=24, test_prompts=8, unreadable_images=2)


@pytest.fixture(scope="session")
def imagereward_folder(imagereward_world: ImageRewardWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small ImageRewardDB."""
    folder = tmp_path_factory.mktemp("imagereward")
    write_imagereward(folder, imagereward_world)
    return folder


@pytest.fixture(scope="session")
def hpdv2_folder(hpdv2_world: Hpdv2World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small HPDv2."""
    folder = tmp_path_factory.mktemp("hpsv2")
    write_hpdv2(folder, hpdv2_world)
    return folder
