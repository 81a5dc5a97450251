"""The log on its way from the VM: every line says where its bytes belong, so that none is lost or shown twice.

gcloud repeats a command whose connection broke, from its beginning and into the same output, without a word to its
caller. So what arrives may be cut off anywhere and may repeat itself; each line is therefore judged on its own.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass


@dataclass(frozen=True)
class End:
    """How a run ended: its exit code, or None if nobody noted one (the VM restarted, or the run was killed)."""

    code: int | None


@dataclass
class LogStream:
    """What has arrived of one log. ``offset`` is the number of its bytes that are here."""

    offset: int = 0
    end: End | None = None

    def feed(self, line: bytes) -> bytes:
        """Take a line of ``remote.sh follow`` and return the bytes of the log that are new."""
        words = line.split()
        if len(words) == 4 and words[0] == b"kvcycle-log":
            return self._log(*words[1:])
        if len(words) >= 3 and words[0] == b"kvcycle-end":
            self._ended(words[1:])
        return b""

    def _log(self, at: bytes, length: bytes, text: bytes) -> bytes:
        try:
            start, data = int(at), base64.b64decode(text, validate=True)
            whole = len(data) == int(length)
        except (ValueError, binascii.Error):
            return b""
        if not whole or not start <= self.offset < start + len(data):
            return b""
        new = data[self.offset - start :]
        self.offset += len(new)
        return new

    def _ended(self, words: list[bytes]) -> None:
        try:
            # Only once all of the log is here: what is missing is asked for again.
            if int(words[0]) != self.offset:
                return
            if words[1:] == [b"lost"]:
                self.end = End(None)
            elif len(words) == 3 and words[1] == b"ended":
                self.end = End(int(words[2]))
        except ValueError:
            return
