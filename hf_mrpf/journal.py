"""A journal: what a long measurement has found so far, on disk, so that an interrupted one goes on from there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from .processes import Processes


class Journal:
    r"""
    Append-only file of JSON lines, to be used as a context manager while entries are added.

    The first line says what the entries belong to; a file about anything else is begun anew. A last line that was cut
    short is dropped. Floats come back bit for bit. On several processes the main one reads and writes the file, and
    every process has the same entries.

    Args:
        path (`Path` or `str`, *optional*):
            The file; its folder is made. With None nothing is kept.
        subject (`Mapping[str, Any]`):
            Everything that the entries depend on, JSON values only.
        processes ([`Processes`], *optional*):
            Who takes part; every process must make the same calls.

    Attributes:
        entries (`list[dict]`): what was found so far.
    """

    def __init__(self, path: Path | str | None, subject: Mapping[str, Any], processes: Processes | None = None):
        self.processes = processes or Processes()
        self.path = Path(path) if path is not None and self.processes.is_main else None
        self.subject = json.loads(json.dumps(subject, allow_nan=False))
        self.entries: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        whole = self._read() if self.path is not None else b""
        self.entries = self.processes.from_main(self.entries)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if whole else "wb")
            self._file.truncate(len(whole))
            self._file.seek(len(whole))
            if not whole:
                self._write({"subject": self.subject})
        return self

    def __exit__(self, *exception: object) -> None:
        if self.path is not None:
            self._file.close()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Put an entry on disk before going on."""
        self.entries.append(dict(entry))
        if self.path is not None:
            self._write(entry)

    def _write(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def _read(self) -> bytes:
        """Fills in the entries of a file on the same subject; the bytes that they take up, empty for any other file."""
        if self.path is None or not self.path.is_file():
            return b""
        whole, found = b"", []
        for line in self.path.read_bytes().splitlines(keepends=True):
            content = _parse(line) if line.endswith(b"\n") else None
            if content is None:
                break  # cut short, and with it whatever follows
            whole += line
            found.append(content)
        if not found or found[0] != {"subject": self.subject}:
            return b""
        self.entries = found[1:]
        return whole


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
