"""How far long work has come: a bar in a terminal, a line now and then in a log file, nothing on ranks above 0."""

import sys
import time
from typing import Any, Protocol

from tqdm.auto import tqdm

# Between two lines of the same work in a log file, where a bar would write thousands.
SECONDS_BETWEEN_LINES = 30.0
_LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} [{elapsed}, {rate_fmt}{postfix}]"


class Bar(Protocol):
    """What a `tqdm` bar and [`ProgressLines`] have in common."""

    n: Any
    total: Any

    def update(self, n: int = 1) -> Any: ...
    def set_description(self, desc: str, refresh: bool = True) -> None: ...
    def set_postfix(self, ordered_dict: Any, refresh: bool = True) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *exception: Any) -> None: ...


class ProgressLines:
    """
    Stands for a `tqdm` bar where the output is no terminal: whole lines, seldom.

    Args:
        total (`int` or None): units of work to come, where that is known.
        description (`str`): what is being done.
        unit (`str`): of what.
        leave (`bool`): whether the end is worth a line, however short the work was.
    """

    def __init__(self, total: int | None, description: str, unit: str, leave: bool = True):
        self.total, self.n = total, 0
        self.description, self.unit, self.leave = description, unit, leave
        self.postfix = ""
        self._start = self._written = time.monotonic()
        self._open = True

    def update(self, n: int = 1) -> None:
        """`n` further units are done."""
        self.n += n
        if time.monotonic() - self._written >= SECONDS_BETWEEN_LINES:
            self._write()

    def set_description(self, desc: str, refresh: bool = True) -> None:
        """As in `tqdm`; shown with the next line."""
        self.description = desc

    def set_postfix(self, ordered_dict: dict[str, Any], refresh: bool = True) -> None:
        """As in `tqdm`; shown with the next line."""
        self.postfix = ", ".join(f"{name}={value}" for name, value in ordered_dict.items())

    def close(self) -> None:
        """Writes how much was done and how fast; once."""
        if self._open and self.leave:
            self._write()
        self._open = False

    def _write(self) -> None:
        self._written = time.monotonic()
        line = tqdm.format_meter(
            self.n, self.total, self._written - self._start, prefix=self.description, unit=self.unit,
            postfix=self.postfix, bar_format=_LINE if self.total else _LINE_WITHOUT_TOTAL,
        )  # fmt: skip
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def progress_bar(total: int | None, description: str, unit: str, *, shown: bool = True, leave: bool = True) -> Bar:
    """
    A bar with rate and time left on standard error, to be closed or used as a context manager.

    Args:
        total (`int` or None):
            Units of work to come; None where that is not known, and then no time left is shown.
        description (`str`):
            What is being done.
        unit (`str`):
            Of what, in the singular: `"image"`.
        shown (`bool`, *optional*, defaults to `True`):
            Whether to show anything.
        leave (`bool`, *optional*, defaults to `True`):
            Whether the bar stays when the work is done.

    Returns:
        A `tqdm` bar, or [`ProgressLines`] where standard error is no terminal (nor a notebook): a line every 30 seconds
        and one at the end.
    """
    # In a notebook tqdm.auto draws a widget, and needs no terminal for it.
    widget = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    if shown and not widget and not sys.stderr.isatty():
        return ProgressLines(total, description, unit, leave)
    return tqdm(total=total, desc=description, unit=unit, leave=leave, disable=not shown, dynamic_ncols=True)


def shows_progress(args: Any) -> bool:
    """Whether a process with these `TrainingArguments` shows bars: the main one does, unless `disable_tqdm`."""
    return not args.disable_tqdm and args.process_index == 0
