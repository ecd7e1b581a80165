"""Progress of long work: bars on a terminal; lines in a log, where a bar would fill one endless line."""

import sys
import time
from typing import Any

SECONDS_BETWEEN_LINES = 15


def lines_in_logs() -> None:
    """Turn the progress bars of every library into lines where output is not a terminal."""
    if not sys.stderr.isatty() and not isinstance(sys.stderr, _BarsAsLines):
        sys.stdout, sys.stderr = _BarsAsLines(sys.stdout), _BarsAsLines(sys.stderr)


class _BarsAsLines:
    """A text stream that writes the state of a bar every SECONDS_BETWEEN_LINES, and its last state."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._shown = ""  # state of the bar that is not written yet
        self._written = time.monotonic()

    def write(self, text: str) -> int:
        if "\r" in text:
            # A bar rewrites its line from the start; an empty rewrite only clears it.
            self._shown = text.rsplit("\r", 1)[1].strip() or self._shown
            if text.endswith("\n") or time.monotonic() - self._written >= SECONDS_BETWEEN_LINES:
                self._write_shown()
        elif text == "\n" and self._shown:  # the bar is closed
            self._write_shown()
        else:
            self._stream.write(text.replace("\x1b[A", ""))  # cursor up, from a bar below another
        return len(text)

    def _write_shown(self) -> None:
        if self._shown:
            self._stream.write(f"{self._shown}\n")
            self._stream.flush()
            self._written, self._shown = time.monotonic(), ""

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
