"""Overlays and changes on config.yaml, against Snakemake's own merging and parsing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from snakemake.cli import parse_config
from snakemake.utils import update_config

from workflow_scripts.configuration.model import ConfigurationError, load
from workflow_scripts.configuration.overlays import merge, parse_changes, read_configuration
from workflow_scripts.files.paths import ROOT

VALUES = st.recursive(
    st.none() | st.integers() | st.lists(st.integers()),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)
MAPPINGS = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


@given(base=MAPPINGS, overlay=MAPPINGS)
def test_mappings_are_merged_as_by_snakemake(base: dict[str, Any], overlay: dict[str, Any]) -> None:
    before, expected = copy.deepcopy(base), copy.deepcopy(base)
    update_config(expected, overlay)
    assert merge(base, overlay) == expected
    assert base == before


def test_overlays_are_read_in_order_and_changes_win(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("seeds: [1]\npolicy: {dtype: bfloat16}\n")
    c = read_configuration([ROOT / "configs/paper.yaml", overlay], {"policy": {"attention": "eager"}})
    assert (c.seeds, c.policy.dtype, c.policy.attention, c.policy.source) == ([1], "bfloat16", "eager", "hub")


@pytest.mark.parametrize(
    "settings",
    [
        ["seeds=[0, 1]"],
        ["numeric_threads=2", "results=elsewhere"],
        ["training={imagereward: {gradient_checkpointing: true, learning_rate: 1e-3}}"],
    ],
    ids=str,
)
def test_settings_give_the_configuration_that_snakemake_would_give(settings: list[str]) -> None:
    raw = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    update_config(raw, parse_config(settings))
    assert read_configuration([], parse_changes(settings)) == load(raw)


@pytest.mark.parametrize(
    ("content", "told"), [(None, "No such file"), ("a: [", "cannot be read"), ("- a", "holds no keys")], ids=str
)
def test_a_file_that_is_no_overlay_is_named(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "wrong.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=told) as raised:
        read_configuration([path])
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(("setting", "told"), [("seeds", "give key=value"), ("seeds=[0", "not YAML")])
def test_a_setting_without_a_value_is_refused(setting: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        parse_changes([setting])
