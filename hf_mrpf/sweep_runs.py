"""Doing the cells of a sweep: what is finished is skipped, what fails is told and does not stop the rest."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .run_folder import RunFolder
from .sweep import TITLES, Cell, run_folder
from .sweep_table import TABLE, append_row, finished, latest, read_rows, results_of, row_of

LINES_OF_A_REASON = 12
# For which a run that was stopped may go on: it ends its step and writes a checkpoint.
SECONDS_TO_SAVE = 60.0
_BETWEEN_LOOKS = 0.1
_STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
Launch = Callable[[Sequence[str], Path, Path], int]
Say = Callable[[str], None]


class Stopped(Exception):
    """The sweep was stopped by a signal; `signum` is its number."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def pending(cells: Iterable[Cell], output_dir: Path) -> list[Cell]:
    """
    The cells that are still to be done, in the given order.

    A cell is done once its row says so. One that another still starts from must also have its folder: the table
    outlives folders that were removed for their size.
    """
    done = finished(read_rows(output_dir / TABLE))
    cells = list(cells)
    to_do = {cell.name for cell in cells if cell.name not in done}
    for cell in reversed(cells):  # those that start from another come after it
        if cell.name in to_do and cell.start and not _has_model(output_dir, cell.start):
            to_do.add(cell.start.name)
    return [cell for cell in cells if cell.name in to_do]


def run_cells(
    cells: Sequence[Cell],
    output_dir: Path,
    command: Callable[[Cell], Sequence[str]],
    *,
    launch: Launch,
    say: Say = print,
) -> list[Cell]:
    """
    Does cells one after the other, each in a process of its own, and appends a row as each of them ends.

    Several calls may share the cells: one that another is doing is not begun here, and one that another has finished in
    the meantime is passed over.

    Args:
        cells (`Sequence[Cell]`): to be done, each after the one that it starts from.
        output_dir (`Path`): folder of the sweep.
        command (`Callable`): the command of a cell.
        launch (`Callable`): runs a command, its output and its errors going to two files; gives the exit status.
        say (`Callable`, *optional*): takes one line for each cell as it begins and as it ends.

    Returns:
        `list[Cell]`: those that did not end well, or could not be begun.
    """
    left: list[Cell] = []
    for number, cell in enumerate(cells, start=1):
        say(f"[{number}/{len(cells)}] {cell.name}")
        with _held(cell, output_dir) as other:
            if other:
                say(f"  not begun here: {other}")
                left.append(cell)
            elif _settled(cell, output_dir):
                say("  finished by another call in the meantime")
            elif cell.start and not _has_model(output_dir, cell.start):
                say(f"  not begun: {cell.start.name}, which it starts from, {_why(cell.start, output_dir)}")
                left.append(cell)
            else:
                row = _done(cell, output_dir, command(cell), launch)
                append_row(output_dir / TABLE, row)
                say(_ended(row))
                left += [cell] if row["status"] != "finished" else []
    return [cell for cell in left if not _settled(cell, output_dir)]


@contextmanager
def _held(cell: Cell, output_dir: Path) -> Iterator[str]:
    """Keeps other calls from doing a cell; where one does it already, says so and touches nothing of it."""
    file = _log(cell, output_dir, "lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(file), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield f"it is being done by pid {file.read_text().strip() or 'unknown'}"
        return
    try:
        file.write_text(f"{os.getpid()}\n")
        try:
            # A run may have outlived the call that began it, where that was killed.
            RunFolder(run_folder(output_dir, cell), {}, overwrite=True).check()
        except ValueError as error:
            yield str(error)
        else:
            yield ""
    finally:
        lock.release()


def _settled(cell: Cell, output_dir: Path) -> bool:
    return cell.name in finished(read_rows(output_dir / TABLE)) and _has_model(output_dir, cell)


def _done(cell: Cell, output_dir: Path, words: Sequence[str], launch: Launch) -> dict[str, Any]:
    out, err = _log(cell, output_dir, "out"), _log(cell, output_dir, "err")
    start = time.monotonic()
    status = launch(words, out, err)
    seconds = round(time.monotonic() - start, 1)
    if status == 0:
        try:
            return row_of(cell, status="finished", seconds=seconds, **results_of(run_folder(output_dir, cell)))
        except (ValueError, OSError) as error:
            reason = f"the run ended well, but its result cannot be read: {error}"
    else:
        reason = f"exit status {status}\n{last_lines(err.read_text(errors='replace'))}"
    return row_of(cell, status="failed", seconds=seconds, reason=reason)


def _log(cell: Cell, output_dir: Path, ending: str) -> Path:
    return output_dir / "logs" / f"{cell.name}.{ending}"


def _ended(row: Mapping[str, Any]) -> str:
    if row["status"] == "finished":
        return f"  {_figures(row['kind'], row['results'])}, {row['seconds']:,.0f} s"
    return f"  failed after {row['seconds']:,.0f} s; the next call tries it again:\n{_indented(row['reason'])}"


def last_lines(text: str) -> str:
    """What a run says of its end: its last lines of errors, without what a launcher adds of its own."""
    defaults = r"The following values were not passed to `accelerate launch`.*\n(?:\t.*\n)*(?:To avoid this warning.*)?"
    launchers = rf"{defaults}|Traceback \(most recent call last\):\n(?:(?!Traceback).*\n)*.*CalledProcessError: .*"
    lines = [line.rstrip() for line in re.sub(launchers, "", text).splitlines() if line.strip()]
    return "\n".join(lines[-LINES_OF_A_REASON:]) or "nothing was written to standard error"


def run_process(words: Sequence[str], out: Path, err: Path) -> int:
    """
    Runs a command, its output in two files, and gives its exit status.

    Raises:
        Stopped: where this process gets SIGINT, SIGTERM or SIGHUP; the command was stopped too, and has ended.
    """
    with out.open("wb") as output, err.open("wb") as errors, _signals_noted() as noted:
        # A session of its own: the signal of a terminal reaches the run once, through here.
        process = subprocess.Popen(words, stdout=output, stderr=errors, start_new_session=True)
        passed_on, waited = 0, 0.0
        # A launcher may end before the run that it started, which is still saving a checkpoint.
        while process.poll() is None or (noted and waited < SECONDS_TO_SAVE and _passed_on(process.pid, 0)):
            for signum in noted[passed_on:]:
                # A run saves a checkpoint at the first two; of a terminal that was closed it knows nothing.
                _passed_on(process.pid, signum if signum in _STOPPING[:2] else signal.SIGTERM)
            passed_on = len(noted)
            waited += _BETWEEN_LOOKS if noted else 0.0
            time.sleep(_BETWEEN_LOOKS)
    if noted:
        raise Stopped(noted[0])
    return process.returncode


def _passed_on(group: int, signum: int) -> bool:
    """Sends a signal to a group of processes; whether there is one (signal 0 only asks)."""
    try:
        os.killpg(group, signum)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    noted: list[int] = []
    heeded = [signum for signum in _STOPPING if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, lambda got, _: noted.append(got)) for signum in heeded}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _has_model(output_dir: Path, cell: Cell) -> bool:
    return (run_folder(output_dir, cell) / "config.json").is_file()


def _why(cell: Cell, output_dir: Path) -> str:
    row = latest(read_rows(output_dir / TABLE)).get(cell.name)
    return "failed" if row and row["status"] == "failed" else "has not been done"


def _figures(kind: str, results: Mapping[str, Any]) -> str:
    name, model = list(results["models"].items())[-1]
    name = TITLES.get(kind, name)  # the recipe that trains a control calls it dense
    accuracies = ", ".join(f"{attack} {100 * model[attack]:.1f} %" for attack in ("clean", "pgd20"))
    return f"{name}: {accuracies} ({results['split']}, n = {results['num_samples']:,})"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
