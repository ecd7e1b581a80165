"""Texts are written without the secrets of the environment and without the logins of addresses."""

from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from workflow_scripts.files.redaction import HIDDEN, redacted


@given(
    password=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=6),
    user=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5),
    words=st.text(max_size=20),
)
def test_no_password_of_an_address_is_left(password: str, user: str, words: str) -> None:
    assume(password not in HIDDEN and HIDDEN not in password)
    address = f"http://{quote(user, safe='')}:{quote(password, safe='')}@host:1/path"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HTTPS_PROXY", address)
        said = redacted(f"{words} {address} {password} {quote(password, safe='')}")
    assert quote(password, safe="") not in said and f"{password} " not in said + " "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see http://u:p@h:5/x?y=1, http://h/a@b", "see http://h:5/x?y=1, http://h/a@b"),
        ("http://u:p@ss@h", "http://h"),
        ("postgresql://u@h/db?password=abc&sslmode=off", f"postgresql://h/db?password={HIDDEN}&sslmode=off"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
        ("me@example.org: 1 > 0", "me@example.org: 1 > 0"),
    ],
)
def test_logins_are_cut_out_of_addresses(text: str, expected: str) -> None:
    assert redacted(text) == expected


def test_short_and_harmless_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel")
    assert redacted("1 parallel") == "1 parallel"
