"""What a recipe shows: its first line, one line a stage, bars that carry figures, errors as one message."""

import sys
import time
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from transformers import ProgressCallback, TrainingArguments

from .faults import explain
from .launch import LaunchError, is_first

SECONDS_FOR_THE_FIRST = 60
SHOWN_IN_BAR = {"loss": "loss", "eval_accuracy": "clean", "eval_robust_accuracy": "robust"}


def announce(args: TrainingArguments) -> None:
    """The first line a recipe prints."""
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    say(args, f"world size {args.world_size}, device {args.device}, dtype {dtype}, seed {args.seed}")


def say(args: TrainingArguments, line: str) -> None:
    """Prints a line, on the main process alone."""
    if args.process_index == 0:
        print(line, flush=True)


class StageProgress(ProgressCallback):
    """A bar that carries the newest figures, where `ProgressCallback` prints a line for each."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.figures: dict[str, str] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs:
            self.figures |= {short: f"{float(logs[name]):.3g}" for name, short in SHOWN_IN_BAR.items() if name in logs}
            self.training_bar.set_postfix(self.figures)


def quieten() -> None:
    """Leaves to the bars of the stages what libraries would print for every file they write."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def report_errors(main: Callable[[], None]) -> None:
    """
    Runs `main`; what a user can put right is printed as one message, and the exit status is 2.

    A launch that every process refuses is spoken of by the first one alone.
    """
    try:
        main()
    except (ValueError, ImportError, OSError, MemoryError, RuntimeError, SafetensorError) as error:
        message = explain(error)
        if message is None:
            raise
        if isinstance(error, LaunchError) and not is_first():
            # A launcher ends all processes once one has failed, and the first may still have its message to write.
            time.sleep(SECONDS_FOR_THE_FIRST)
        else:
            print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
