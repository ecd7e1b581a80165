"""Keeping secrets of the environment out of everything that is written: tokens, passwords, addresses with a login.

A secret is the value of a variable that is named like one (HF_TOKEN, MLFLOW_TRACKING_PASSWORD, AWS_SECRET_ACCESS_KEY),
and the login in an address wherever it stands (MLFLOW_TRACKING_URI, HF_ENDPOINT, HTTPS_PROXY).
"""

import logging
import os
import re
import sys
from typing import Any
from urllib.parse import unquote, urlsplit

NAMED_SECRET = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS|_KEY)$", re.IGNORECASE)
LOGIN = re.compile(r"(?<=://)[^\s/@'\"]*(@[^\s/@'\"]*)*@")
IN_QUERY = re.compile(r"(?<=[?&])([\w-]*(?:password|token|secret|signature)=)[^&\s'\"]+", re.IGNORECASE)
SHORTEST = 6  # a shorter value may be any word: "1", "false"
HIDDEN = "[hidden]"


def redacted(text: str) -> str:
    """The text without the logins of its addresses and without the secrets of the environment."""
    text = IN_QUERY.sub(rf"\1{HIDDEN}", LOGIN.sub("", text))
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def has_password(address: str) -> bool:
    """Whether an address holds a password, before its host or in its query."""
    return bool(urlsplit(address).password or IN_QUERY.search(address))


def redact_output() -> None:
    """Let nothing that this process prints or logs hold a secret, whichever library writes it."""
    if isinstance(sys.stderr, _RedactedStream):
        return
    sys.stdout, sys.stderr = _RedactedStream(sys.stdout), _RedactedStream(sys.stderr)
    logging.setLogRecordFactory(_RedactedRecord)  # libraries log to the streams as they found them when imported


class _RedactedRecord(logging.LogRecord):
    """A log record that says what `redacted` leaves."""

    def getMessage(self) -> str:  # noqa: N802
        if self.exc_info and not self.exc_text:
            self.exc_text = redacted(logging.Formatter().formatException(self.exc_info))
        return redacted(super().getMessage())


class _RedactedStream:
    """A text stream that writes what `redacted` leaves."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self._stream.writelines(map(redacted, lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _secrets() -> list[str]:
    """Secrets of the environment, the longest first: a shorter one may be a part of it."""
    found = set()
    for name, value in os.environ.items():
        if NAMED_SECRET.search(name):
            found.add(value)
        if "://" in value:
            try:
                password = urlsplit(value).password or ""
            except ValueError:  # not an address after all
                continue
            found |= {password, unquote(password)}
    return sorted((secret for secret in found if len(secret) >= SHORTEST), key=len, reverse=True)
