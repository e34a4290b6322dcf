"""The output folder of a run: one writer at a time, one set of settings, stages that are finished or not."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from . import __version__

# What a folder looks like inside; raised where an older version could not go on with it.
FORMAT = 1
# Seconds for which the workers of a killed run may still hold its lock: they see only then that it is gone.
LEFT_BEHIND = 15.0
STATE_FILE = "run.json"
LOCK_FILE = "run.lock"
STAGES = "stages"
STAGE_FILE = "stage.json"
# What recipes/export.py makes of the result.
EXPORTS = "export"
RESULT_FILES = (
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "pruning_plan.json",
    "robustness_report.json",
    "README.md",
    "mrs.png",
    "modeling.py",
)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` so that a reader sees the old file or the new one, never half of one."""
    draft = path.with_name(f".{path.name}.draft")
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a loss of power can leave an empty file under the name
    os.replace(draft, path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a ValueError names the file where it is none."""
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it was changed by hand or cut short.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def file_sums(folder: Path, *patterns: str) -> dict[str, str]:
    """SHA-256 of the files in `folder` that fit any of the patterns, by their paths within it."""
    found = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    return {file.relative_to(folder).as_posix(): _sha256(file) for file in found}


def check_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """
    Refuses a folder whose files are not those that were written.

    Raises:
        ValueError: with the first file that is missing or changed.
    """
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing.")
        if _sha256(file) != expected:
            raise ValueError(f"{file} is not as it was written ({file.stat().st_size:,} bytes): edited, or cut short.")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _alone(value: Any) -> Any:
    """What a run of one process shares with the others: nothing."""
    return value


class RunFolder:
    r"""
    Folder of one run, to be used as a context manager while it is written.

    Args:
        path (`Path` or `str`):
            The folder; it is made if it does not exist.
        settings (`Mapping[str, Any]`):
            What makes this run this run, JSON values only. A folder that holds a run with other settings is refused.
        overwrite (`bool`, *optional*, defaults to `False`):
            Starts again: removes what a run of this library has written there, and nothing else.
        is_main (`bool`, *optional*, defaults to `True`):
            Whether this process writes. The others hold no lock and write nothing.
        share (`Callable`, *optional*):
            Gives every process of a run the value that the main process calls it with. All of them enter, `check()` and
            ask for `finished` together: the main process alone reads the folder then, and its answer holds for all.

    Raises:
        ValueError: on entering, where another process writes to the folder, it cannot be written to, a newer version of
            this library wrote it, or it holds other settings (each is named).
    """

    def __init__(
        self,
        path: Path | str,
        settings: Mapping[str, Any],
        *,
        overwrite: bool = False,
        is_main: bool = True,
        share: Callable[[Any], Any] = _alone,
    ):
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.overwrite = overwrite
        self.is_main = is_main
        self._share = share
        # The lock is the operating system's: it ends with its process, however that ends.
        self._lock = FileLock(str(self.path / LOCK_FILE), timeout=0)

    def __enter__(self) -> "RunFolder":
        self._together(self._enter)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_main:
            self._lock.release()

    def check(self) -> None:
        """Refuses, before anything is loaded or written, a folder that this run could not go on in."""
        self._together(self._check)

    def _together(self, step: Callable[[], None]) -> None:
        """Takes a step on the main process; where it is refused there, every process gets the refusal."""
        error: ValueError | OSError | None = None
        if self.is_main:
            try:
                step()
            except (ValueError, OSError) as refusal:
                error = refusal
        told = self._share(error and str(error))
        if error is not None:
            raise error
        if told is not None:
            raise ValueError(told)

    def _enter(self) -> None:
        self._check()
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        try:
            (self.path / LOCK_FILE).write_text(f"{os.getpid()}\n")
            # Again under the lock: another run may have written between the check and the lock.
            self._check()
            if self.overwrite:
                self._clear()
            if not self._state():
                state = {"format": FORMAT, "version": __version__, "settings": self.settings, "finished": False}
                write_json(self.path / STATE_FILE, state)
        except BaseException:
            self._lock.release()
            raise

    def _check(self) -> None:
        # os.path: the methods of Path raise where a folder above may not be entered.
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise ValueError(f"--output_dir {self.path} is a file; give a folder.")
        there = next(folder for folder in (self.path, *self.path.absolute().parents) if os.path.exists(folder))
        self._check_access(there, os.R_OK | os.X_OK)
        if not self._lock.is_locked and (self.path / LOCK_FILE).exists() and os.access(self.path / LOCK_FILE, os.W_OK):
            self._acquire()  # only to see that nobody else holds it
            self._lock.release()
        state = {} if self.overwrite else self._state()
        if state:
            self._check_format(state)
            self._compare(state.get("settings", {}))
        elif not self.overwrite and (
            taken := [name for name in (*RESULT_FILES, STAGES) if (self.path / name).exists()]
        ):
            raise ValueError(
                f"{self.path} holds {', '.join(taken)} but no {STATE_FILE}, so it is no run that can be gone on with. "
                "Give another --output_dir, or --overwrite_output_dir to replace those files."
            )
        if state.get("finished"):  # there is nothing left to write
            return
        stages = list((self.path / STAGES).glob("*"))
        for place in (there, self.path / STAGES, *stages, self.path / STATE_FILE, self.path / LOCK_FILE):
            if place.exists():
                self._check_access(place, os.W_OK | os.X_OK if place.is_dir() else os.W_OK)

    def _check_format(self, state: Mapping[str, Any]) -> None:
        found = state.get("format", FORMAT)
        if isinstance(found, bool) or not isinstance(found, int) or found > FORMAT:
            raise ValueError(
                f"{self.path / STATE_FILE} was written by hf_mrpf {state.get('version', 'of an unknown version')} in "
                f"format {found}, and hf_mrpf {__version__} knows formats up to {FORMAT}. Update hf_mrpf, give another "
                "--output_dir, or --overwrite_output_dir to start again."
            )

    def _check_access(self, place: Path, mode: int) -> None:
        if not os.access(place, mode):
            raise ValueError(
                f"--output_dir {self.path} cannot be written to: no permission for {place}, or a read-only disk. "
                "Give another --output_dir, or the permission to write there."
            )

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout as error:
            pid = (self.path / LOCK_FILE).read_text().strip() or "unknown"
            if pid.isdigit() and not _is_running(int(pid)):
                try:
                    self._lock.acquire(timeout=LEFT_BEHIND)
                    return
                except Timeout:
                    pid += ", which has ended, but a process it started has not"
            raise ValueError(
                f"{self.path} is being written by another run (pid {pid}, {self.path / LOCK_FILE}). "
                "Wait for it, stop it, or give another --output_dir."
            ) from error

    def _compare(self, there: Mapping[str, Any]) -> None:
        names = sorted(there.keys() | self.settings.keys())
        differing = [
            f"  {name}: {there.get(name)!r} there, {self.settings.get(name)!r} here"
            for name in names
            if there.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"{self.path} holds a run with other settings:\n" + "\n".join(differing) + "\n"
                "Give another --output_dir, or --overwrite_output_dir to start again."
            )

    def _clear(self) -> None:
        # First of all the state: a folder that is half cleared must not pass for a run, let alone a finished one.
        for name in (STATE_FILE, *RESULT_FILES):
            (self.path / name).unlink(missing_ok=True)
        for name in (EXPORTS, STAGES):
            remove_folder(self.path / name)

    def _state(self) -> dict[str, Any]:
        file = self.path / STATE_FILE
        try:
            return read_json(file) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{error} --overwrite_output_dir starts the run again.") from error

    @property
    def finished(self) -> bool:
        """Whether the whole run has ended well; asked by all processes together."""
        return self._share(self.is_main and self._state().get("finished", False))

    def finish(self) -> None:
        """Marks the run as ended well, with the SHA-256 of its result: the same command then has nothing left to do."""
        if self.is_main:
            # Of the card alone none is kept: people add to it.
            sums = file_sums(self.path, *(name for name in RESULT_FILES if name != "README.md"), "model-*.safetensors*")
            write_json(self.path / STATE_FILE, self._state() | {"finished": True, "files": sums})

    def lacking(self) -> str | None:
        """What of the result of a finished run is missing or changed, in a few words; None where it is whole."""
        try:
            check_sums(self.path, self._state().get("files", {}))
        except ValueError as error:
            return str(error).rstrip(".")
        return None if (self.path / "README.md").is_file() else f"{self.path / 'README.md'} is missing"

    def stage(self, name: str) -> Path:
        """Folder of a stage."""
        return self.path / STAGES / name

    def stage_result(self, name: str) -> dict[str, Any] | None:
        """What `finish_stage` recorded, or None where the stage has not ended."""
        record = self._stage_record(name)
        return record and {key: value for key, value in record.items() if key != "files"}

    def _stage_record(self, name: str) -> dict[str, Any] | None:
        file = self.stage(name) / STAGE_FILE
        return read_json(file) if file.is_file() else None

    def check_stage(self, name: str) -> None:
        """
        Refuses a finished stage whose model, plan or sensitivities are not as they were written.

        Raises:
            ValueError: with the file, and what to do.
        """
        try:
            check_sums(self.stage(name), (self._stage_record(name) or {}).get("files", {}))
        except ValueError as error:
            raise ValueError(
                f"{error} Put the file back, or remove {self.stage(name)} and the stages made after it: "
                "the same command then does them again."
            ) from error

    def finish_stage(self, name: str, result: Mapping[str, Any]) -> None:
        """Records that everything of the stage is written, with the SHA-256 of its files; to be called last."""
        if self.is_main:
            folder = self.stage(name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STAGE_FILE).unlink(missing_ok=True)
            write_json(folder / STAGE_FILE, dict(result) | {"files": file_sums(folder, "*.json", "model/*")})

    def publish(self, draft: Path) -> None:
        """
        Moves the finished result files from `draft`, a folder on the same disk, into the run's folder.

        A kill between two of them is healed by the next call: the run is not finished before all of them are there.
        """
        for file in sorted(draft.iterdir()):
            os.replace(file, self.path / file.name)
        draft.rmdir()


def remove_folder(folder: Path) -> None:
    """Removes a folder if it is there. An OSError where something stays: it would pass for what is written next."""
    if folder.exists():
        shutil.rmtree(folder)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
