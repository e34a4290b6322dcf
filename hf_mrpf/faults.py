"""Faults that libraries report from deep inside, in the words of whoever can put them right."""

import errno
import re
import time
from collections.abc import Callable

import torch

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Texts, where the class of an error says nothing: most of these are a bare RuntimeError.
OUT_OF_MEMORY = r"out of memory|can't allocate memory|not enough memory|No executable batch size"
WORKER = r"DataLoader worker \(pid\(?s?\)? ?[\d, ]+\)"
SECONDS_FOR_THE_SIGNAL = 10
LOST_PEER = r"Connection closed by peer|Connection reset by peer|Connection refused|gloo|NCCL|Timed out waiting"
# The second line is torch.save, which loses the cause on its way.
NO_SPACE = (
    r"No space left|os error 28|Disk quota exceeded|"
    r"inline_container.*(unexpected pos|write failed)|PytorchStreamWriter failed|iostream error"
)


def explain(error: BaseException) -> str | None:
    """
    What has happened and what to do, where an error is one that a user can put right.

    Args:
        error (`BaseException`): as a library raised it, or one of ours.

    Returns:
        `str`, or None for an error that is nobody's but the library's own: its traceback is wanted then.
    """
    if is_out_of_memory(error):
        return str(error) if isinstance(error, MemoryError) and str(error) else out_of_memory()
    if is_disk_full(error):
        place = getattr(error, "filename", None)
        return (
            f"The disk is full{f' (while writing {place})' if place else ''}. What was finished before is kept: "
            "make room, and the same command goes on from there."
        )
    text = str(error)
    worker = re.search(WORKER, text) if isinstance(error, RuntimeError) else None
    if worker or lost_a_worker(error):
        return (
            f"{worker[0] if worker else 'DataLoader worker'} was killed, most often for want of memory. Lower "
            "--dataloader_num_workers (0 loads in the main process), or give the machine more shared memory; the same "
            "command goes on where it was."
        )
    if isinstance(error, RuntimeError) and _is_of_group(error) and re.search(LOST_PEER, text, re.IGNORECASE):
        return (
            "Another process of this run has ended or cannot be reached, so this one ends too; its own message, or "
            f"the launcher's, says why ({text.splitlines()[0][:160]}). The same command goes on where the run was."
        )
    if isinstance(error, ValueError | ImportError | OSError):
        return text
    return None


def lost_a_worker(error: BaseException) -> bool:
    """Whether a connection broke on which a worker was handing over a batch."""
    if not isinstance(error, ConnectionError | EOFError):
        return False
    place = error.__traceback__
    while place is not None:
        if place.tb_frame.f_globals.get("__name__", "").startswith("torch.utils.data"):
            return True
        place = place.tb_next
    return False


def with_worker_named(main: Callable[[], None]) -> None:
    """
    Runs `main`. Where it loses its connection to a killed worker, the error raised is torch's, which names the worker.

    torch raises that one from the signal of the worker's death, which comes a moment after its connections break.
    """
    try:
        main()
    except (ConnectionError, EOFError) as error:
        if lost_a_worker(error):
            time.sleep(SECONDS_FOR_THE_SIGNAL)
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or in the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(OUT_OF_MEMORY, str(error), re.IGNORECASE))


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of space; safetensors and Arrow have errors of their own for it."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return bool(re.search(NO_SPACE, str(error)))


def out_of_memory(batch_size: int | None = None) -> str:
    """What to do about it; `batch_size` is that of a training step, where it ran out there."""
    if batch_size is None:
        return (
            "Out of memory. Lower --per_device_eval_batch_size (evaluate.py: --batch_size), or --calibration_set_size "
            "where it happened while pruning; what was finished before is kept."
        )
    return (
        f"Out of memory in training at a batch of {batch_size} images on each device. Lower "
        "--per_device_train_batch_size and raise --gradient_accumulation_steps by the same factor, or give "
        "--gradient_checkpointing, or let --auto_find_batch_size look for one that fits."
    )


def _is_of_group(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or torch.distributed.is_initialized()
