"""Checkpoints that are whole or do not count: marked last, ordered by step, removed only once a newer one is marked."""

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from torch import nn

from .run_folder import read_json, write_json

MARKER = "complete.json"
WEIGHTS = "model.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
logger = logging.getLogger(__name__)


def step_of(checkpoint: Path) -> int | None:
    """The training step in the name of a checkpoint folder; None where it is no such name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def checkpoints(folder: Path | str) -> list[Path]:
    """The checkpoint folders in `folder`, whole or torn, in the order of their steps."""
    found = [path for path in Path(folder).glob("checkpoint-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0)


def mark_complete(checkpoint: Path, *, world_size: int = 1, model_only: bool = False) -> None:
    """
    Writes the marker that makes a checkpoint count: the size in bytes of every file in it, and whether those are of the
    model alone (`save_only_model`), so that a training cannot go on from there as it was.

    To be called once everything is written, by every process. The files are on the disk before the marker is, so that
    it also holds after a loss of power.
    """
    sizes = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        sizes[file.relative_to(checkpoint).as_posix()] = file.stat().st_size
    write_json(checkpoint / MARKER, {"files": sizes, "world_size": world_size, "model_only": model_only})


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where it is complete."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not (checkpoint / MARKER).is_file():
        return f"it has no {MARKER}, so it was cut short while it was written"
    try:
        sizes = read_json(checkpoint / MARKER)["files"]
        for name, size in sizes.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes, and {size:,} were written"
    except (ValueError, KeyError, AttributeError):
        return f"its {MARKER} cannot be read"
    return None


def misfit(checkpoint: Path, model: nn.Module) -> str | None:
    """
    What keeps the weights of a complete checkpoint from being those of `model`, in a few words; None where they fit.

    Names and shapes are compared, as of a model before and after pruning. Weights that are not in one file of
    safetensors, such as those of FSDP, are taken to fit.
    """
    if not (checkpoint / WEIGHTS).is_file():
        return None
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    with safe_open(checkpoint / WEIGHTS, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            shape = opened.get_slice(name).get_shape()
            if name not in own:
                return f"it has {name}, which the model has not"
            if shape != own[name]:
                return f"its {name} has the shape {shape}, that of the model {own[name]}"
    return None


def newest_complete(
    folder: Path | str, *, model: nn.Module | None = None, say: Callable[[str], object] = logger.warning
) -> Path | None:
    """
    The complete checkpoint of the highest step in `folder`.

    Args:
        folder (`Path` or `str`): where `checkpoint-<step>` folders lie; it need not exist.
        model (`nn.Module`, *optional*): whose weights it must hold; one of before its pruning has other shapes.
        say (`Callable`, *optional*): gets one line for each newer checkpoint that is skipped.

    Returns:
        `Path`, or None where there is no such checkpoint.
    """
    for checkpoint in reversed(checkpoints(folder)):
        if wrong := fault(checkpoint):
            say(f"{checkpoint} is skipped as torn: {wrong}.")
        elif model is not None and (wrong := misfit(checkpoint, model)):
            say(f"{checkpoint} is skipped as that of another model, or of before or after a pruning: {wrong}.")
        elif holds_model_only(checkpoint):
            say(f"{checkpoint} is skipped: --save_only_model kept no optimizer and schedule to go on with.")
        else:
            return checkpoint
    return None


def check_complete(checkpoint: Path | str) -> Path:
    """
    Refuses a checkpoint that is not whole, or of the model alone.

    Raises:
        ValueError: with what is wrong with it, and which checkpoint beside it could be taken.
    """
    checkpoint = Path(checkpoint)
    wrong = fault(checkpoint)
    if wrong is None and holds_model_only(checkpoint):
        wrong = "--save_only_model kept no optimizer and schedule; from_pretrained loads its weights"
    if wrong:
        other = newest_complete(checkpoint.parent, say=lambda line: None)
        raise ValueError(
            f"The checkpoint {checkpoint} cannot be gone on from: {wrong}. "
            + (f"The newest complete one beside it is {other}." if other else "No checkpoint beside it is complete.")
        )
    return checkpoint


def holds_model_only(checkpoint: Path) -> bool:
    """Whether a complete checkpoint is of the model alone."""
    return read_json(checkpoint / MARKER).get("model_only", False)


def written_by(checkpoint: Path) -> int:
    """The number of processes that wrote a complete checkpoint."""
    return read_json(checkpoint / MARKER).get("world_size", 1)


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint, its marker first: what a kill leaves of it is torn, never taken for whole."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    if checkpoint.exists():
        shutil.rmtree(checkpoint)


def rotate(folder: Path | str, limit: int | None, newest: Path, best: str | None = None) -> None:
    """
    Removes checkpoints until `limit` are left; torn ones first, then those of later steps than `newest`, then by step.

    Steps count, not times: a clock that was set back must not make the newest look old.

    Args:
        folder (`Path` or `str`): where the checkpoints lie.
        limit (`int`, *optional*): how many may stay; None or 0 for all.
        newest (`Path`): the checkpoint that was just marked; it always stays.
        best (`str`, *optional*): path of the best so far; it stays beside the newest, whatever the limit.
    """
    if not limit:
        return
    now = step_of(newest) or 0
    kept = {newest.name} | ({Path(best).name} if best else set())
    present = checkpoints(folder)
    # Later steps can only be there where an earlier place was forced: they belong to the way that was left.
    order = sorted(present, key=lambda path: (fault(path) is None, (step_of(path) or 0) <= now, step_of(path)))
    surplus = len(present) - max(limit, len(kept))
    for checkpoint in [path for path in order if path.name not in kept][: max(surplus, 0)]:
        discard(checkpoint)


def best_beside(checkpoint: Path, best_step: int | None, model: nn.Module) -> str | None:
    """
    The checkpoint of `best_step` in the folder where `checkpoint` now lies, wherever it lay when it was written.

    None where it is torn, or where another training of the model, pruned, has put its own in that place.
    """
    if not best_step:
        return None
    best = checkpoint.parent / f"checkpoint-{best_step}"
    return str(best) if fault(best) is None and misfit(best, model) is None else None
