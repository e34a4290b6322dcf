"""The output folder of a run: one writer at a time, one set of settings, stages that are finished or not."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

STATE_FILE = "run.json"
LOCK_FILE = "run.lock"
STAGES = "stages"
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
    draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
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

    Raises:
        ValueError: on entering, where another process writes to the folder, or it holds other settings (each is named).
    """

    def __init__(self, path: Path | str, settings: Mapping[str, Any], *, overwrite: bool = False, is_main: bool = True):
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.overwrite = overwrite
        self.is_main = is_main
        # The lock is the operating system's: it ends with its process, however that ends.
        self._lock = FileLock(str(self.path / LOCK_FILE), timeout=0)

    def __enter__(self) -> "RunFolder":
        self.check()
        if self.is_main:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            (self.path / LOCK_FILE).write_text(f"{os.getpid()}\n")
            try:
                self._open()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_main:
            self._lock.release()

    def check(self) -> None:
        """Refuses, before anything is loaded or written, a folder that this run could not go on in."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--output_dir {self.path} is a file; give a folder.")
        if self.is_main and not self._lock.is_locked and (self.path / LOCK_FILE).exists():
            self._acquire()  # only to see that nobody else holds it
            self._lock.release()
        if self.overwrite:
            return
        if state := self._state():
            self._compare(state.get("settings", {}))
        elif taken := [name for name in RESULT_FILES if (self.path / name).exists()]:
            raise ValueError(
                f"{self.path} holds {', '.join(taken)} but no {STATE_FILE}, so it is no run that can be gone on with. "
                "Give another --output_dir, or --overwrite_output_dir to replace those files."
            )

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout as error:
            pid = (self.path / LOCK_FILE).read_text().strip() or "unknown"
            raise ValueError(
                f"{self.path} is being written by another run (pid {pid}, {self.path / LOCK_FILE}). "
                "Wait for it, stop it, or give another --output_dir."
            ) from error

    def _open(self) -> None:
        # Checked again under the lock: another run may have written between the check and the lock.
        self.check()
        if self.overwrite:
            self._clear()
        if not self._state():
            write_json(self.path / STATE_FILE, {"settings": self.settings, "finished": False})

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
        for name in (STAGES, EXPORTS):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (*RESULT_FILES, STATE_FILE):
            (self.path / name).unlink(missing_ok=True)

    def _state(self) -> dict[str, Any]:
        file = self.path / STATE_FILE
        try:
            return read_json(file) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{error} --overwrite_output_dir starts the run again.") from error

    @property
    def finished(self) -> bool:
        """Whether the whole run has ended well."""
        return self._state().get("finished", False)

    def finish(self) -> None:
        """Marks the run as ended well: the same command then has nothing left to do."""
        if self.is_main:
            write_json(self.path / STATE_FILE, self._state() | {"finished": True})

    def stage(self, name: str) -> Path:
        """Folder of a stage."""
        return self.path / STAGES / name

    def stage_result(self, name: str) -> dict[str, Any] | None:
        """What `finish_stage` recorded, or None where the stage has not ended."""
        file = self.stage(name) / "stage.json"
        return read_json(file) if file.is_file() else None

    def finish_stage(self, name: str, result: Mapping[str, Any]) -> None:
        """Records that everything of the stage is written; to be called last."""
        if self.is_main:
            self.stage(name).mkdir(parents=True, exist_ok=True)
            write_json(self.stage(name) / "stage.json", dict(result))

    def publish(self, draft: Path) -> None:
        """Moves the finished result files from `draft`, a folder on the same disk, into the run's folder."""
        for file in sorted(draft.iterdir()):
            os.replace(file, self.path / file.name)
        draft.rmdir()
