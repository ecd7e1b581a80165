"""Redaction of everything that a process prints or logs, whichever library writes it."""

import logging
import sys
from typing import Any

from workflow_scripts.files.redaction import redacted


def redact_output() -> None:
    """Replace the standard streams and the log records of this process by ones that pass through `redacted`."""
    if isinstance(sys.stderr, _RedactedStream):
        return
    sys.stdout, sys.stderr = _RedactedStream(sys.stdout), _RedactedStream(sys.stderr)
    logging.setLogRecordFactory(_RedactedRecord)  # libraries log to the streams as they found them when imported


class _RedactedRecord(logging.LogRecord):
    """A log record whose message and traceback are redacted."""

    def getMessage(self) -> str:  # noqa: N802
        if self.exc_info and not self.exc_text:
            self.exc_text = redacted(logging.Formatter().formatException(self.exc_info))
        return redacted(super().getMessage())


class _RedactedStream:
    """A text stream that redacts what is written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self._stream.writelines(map(redacted, lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
