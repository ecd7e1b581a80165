"""Canonical JSON: equal texts for equal values."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow_scripts.files.digests import canonical_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def reordered(value: Any) -> Any:
    """The same value with the keys of every object in the opposite order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@settings(deadline=None)
@given(JSON)
def test_canonical_json_does_not_depend_on_order(value: Any) -> None:
    text = canonical_json(value)
    assert canonical_json(reordered(value)) == text
    assert json.loads(text) == value and "\n" not in text


def test_canonical_json_tells_values_apart() -> None:
    texts = [canonical_json(value) for value in (1, "1", 1.5, True, None, [1], {"a": 1}, {"a": [1]}, {"a": {"b": 1}})]
    assert len(set(texts)) == len(texts)
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))
