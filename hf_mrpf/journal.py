"""A journal: what a long measurement has found so far, on disk, so that an interrupted one goes on from there."""

import json
import logging
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, Self

from .fingerprint import are_alike
from .processes import Processes

LOGGER = logging.getLogger("hf_mrpf")
# What every journal begins with.
_HEAD = b'{"subject": '


class Journal:
    r"""
    Append-only file of JSON lines, to be used as a context manager while entries are added.

    The first line says what the entries belong to. A journal about anything else is begun anew or, with `keep`, moved
    aside, to the first free name of `verdicts.jsonl.1` and so on, with a warning. A last line that was cut short is
    dropped. From any other damaged line on, entries are to be found again, and a copy of the file is kept aside. Floats
    come back bit for bit. On several processes the main one reads and writes the file, and all of them have the same
    entries.

    Args:
        path (`Path` or `str`, *optional*):
            The file; its folder is made. With None nothing is kept.
        subject (`Mapping[str, Any]`):
            Everything that the entries depend on, JSON values only; under `answers` what [`answers_of`] gives, which
            may differ by rounding.
        processes ([`Processes`], *optional*):
            Who takes part; every process must make the same calls.
        keep (`bool`, *optional*, defaults to `False`):
            Whether a journal about something else is kept beside the new one.

    Attributes:
        entries (`list[dict]`): what was found so far.

    Raises:
        ValueError: on every process, as the context begins, where the file is no journal: it is left as it is.
    """

    def __init__(
        self,
        path: Path | str | None,
        subject: Mapping[str, Any],
        processes: Processes | None = None,
        *,
        keep: bool = False,
    ):
        self.keep = keep
        self.processes = processes or Processes()
        self.path = Path(path) if path is not None and self.processes.is_main else None
        self.subject = json.loads(json.dumps(subject, allow_nan=False))
        self.entries: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        refusal = None
        try:
            whole = self._read()
            if self.path is not None:
                self._open(self.path, whole)
        except (OSError, ValueError) as error:
            refusal = str(error)
        # Told to all: the others would wait for a main process that stops alone.
        self.entries, refusal = self.processes.from_main((self.entries, refusal))
        if refusal is not None:
            raise ValueError(refusal)
        return self

    def _open(self, path: Path, whole: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if whole else "wb")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not whole:
            self._write({"subject": self.subject})

    def _is_ours(self, subject: Mapping[str, Any]) -> bool:
        rest, own = ({**content, "answers": None} for content in (subject, self.subject))
        return rest == own and are_alike(subject.get("answers") or {}, self.subject.get("answers") or {})

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
        held = self.path.read_bytes()
        if not _is_journal(held):
            raise ValueError(
                f"journal {self.path} holds something else, which would be lost: it needs a file of its own. Give "
                "another name, or move this file"
            )
        lines = whole_lines(held)
        contents = [parse_line(line) if line.strip() else {} for line in lines]
        good = contents.index(None) if None in contents else len(lines)
        found = [content for content in contents[:good] if content]
        if found and self._is_ours(found[0].get("subject", {})):
            if good < len(lines):
                kept = _free_name(self.path)
                shutil.copy(self.path, kept)
                LOGGER.warning(
                    "%s, line %d is damaged: it and what follows are found again; the file as it was is kept as %s.",
                    *(self.path, good + 1, kept.name),
                )
            self.entries = found[1:]
            return b"".join(lines[:good])
        if len(lines) > 1 and self.keep:
            kept = self.path.rename(_free_name(self.path))
            LOGGER.warning(
                "%s is of another measurement, such as one of other weights: kept as %s.", self.path, kept.name
            )
        return b""


def whole_lines(held: bytes) -> list[bytes]:
    """The lines of a file with their ends; a last one that was cut short, which has none, is left out."""
    return [line + b"\n" for line in held.split(b"\n")[:-1]]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds, or None where it holds something else."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.{number}") for number in count(1))
    return next(name for name in names if not name.exists())


def _is_journal(held: bytes) -> bool:
    """Whether a file begins as one, or was cut short before its first line was whole."""
    line, end, _ = held.partition(b"\n")
    content = parse_line(line)
    if content is None:
        return not end and line[: len(_HEAD)] == _HEAD[: len(line)]
    return content.keys() == {"subject"} and isinstance(content["subject"], dict)
