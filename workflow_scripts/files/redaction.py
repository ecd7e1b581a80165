"""Redaction of texts that are written: no tokens, passwords or addresses with a login.

Secrets are the values of variables that are named like one (HF_TOKEN, MLFLOW_TRACKING_PASSWORD,
AWS_SECRET_ACCESS_KEY), and the login in any address (MLFLOW_TRACKING_URI, HF_ENDPOINT, HTTPS_PROXY).
"""

import os
import re
from urllib.parse import unquote, urlsplit

NAMED_SECRET = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS|_KEY)$", re.IGNORECASE)
LOGIN = re.compile(r"(?<=://)[^\s/@'\"]*(@[^\s/@'\"]*)*@")
IN_QUERY = re.compile(r"(?<=[?&])([\w-]*(?:password|token|secret|signature)=)[^&\s'\"]+", re.IGNORECASE)
SHORTEST = 6  # characters; a shorter value may be any word: "1", "false"
HIDDEN = "[hidden]"


def redacted(text: str) -> str:
    """Remove logins from the addresses in a text, and replace the secrets of the environment."""
    text = IN_QUERY.sub(rf"\1{HIDDEN}", LOGIN.sub("", text))
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def _secrets() -> list[str]:
    """List the secrets of the environment, the longest first: a shorter one may be a part of it."""
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
