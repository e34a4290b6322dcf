"""What a recipe shows: its first line, one line a stage, bars that carry figures, errors as one message."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainingArguments
from transformers.trainer_utils import has_length

from .faults import explain, with_worker_named
from .launch import LaunchError, is_first
from .progress import Bar, progress_bar

SECONDS_FOR_THE_FIRST = 60
SHOWN_IN_BAR = {"loss": "loss", "eval_accuracy": "clean", "eval_robust_accuracy": "robust"}
LOGGER = logging.getLogger("hf_mrpf")


def announce(args: TrainingArguments) -> None:
    """Sets the levels of the log by `--log_level`, and prints the first line of a recipe."""
    set_log_levels(args)
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    say(args, f"world size {args.world_size}, device {args.device}, dtype {dtype}, seed {args.seed}")


class ConsoleHandler(logging.Handler):
    """Prints messages as they are on standard output, above a bar that is open; above info, with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if record.levelno > logging.INFO:
            line = f"{record.levelname.lower()}: {line}"
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def set_log_levels(args: TrainingArguments) -> None:
    """
    Sets the level of this library, transformers and datasets: `--log_level`, on other processes `--log_level_replica`.

    Stage lines are messages of level info, and shown by default; `--log_level warning` or `error` hides them. Python's
    own warnings go with level error, so that no rank repeats those of the main process.
    """
    import datasets
    from transformers.utils import logging as transformers_logging

    main = args.process_index == 0
    chosen = args.log_level if main else args.log_level_replica
    levels = transformers_logging.log_levels
    LOGGER.setLevel(levels.get(chosen, logging.INFO if main else logging.ERROR))
    LOGGER.handlers = [ConsoleHandler()]
    LOGGER.propagate = False
    if chosen in levels:
        transformers_logging.set_verbosity(levels[chosen])
        datasets.logging.set_verbosity(levels[chosen])
        if levels[chosen] > logging.WARNING:
            warnings.simplefilter("ignore")


def say(args: TrainingArguments, line: str) -> None:
    """Prints a line of level info; on ranks above 0 only where `log_level_replica` asks for it."""
    LOGGER.info(line if args.process_index == 0 else f"(process {args.process_index}) {line}")


def show(args: TrainingArguments, text: str) -> None:
    """Prints what a recipe was called for, on the main process, whatever the level of the log."""
    if args.process_index == 0:
        print(text, flush=True)


class StageProgress(ProgressCallback):
    """Bars that carry the newest figures, where `ProgressCallback` prints a line for each; on the main process."""

    training_bar: Bar | None  # type: ignore[assignment]
    prediction_bar: Bar | None  # type: ignore[assignment]

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = progress_bar(state.max_steps, "training", "step")
        self.current_step = 0
        self.figures: dict[str, str] = {}

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and has_length(eval_dataloader):
            if self.prediction_bar is None:
                self.prediction_bar = progress_bar(len(eval_dataloader), "validation", "batch", leave=False)
            self.prediction_bar.update(1)

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
    """Runs `main` within [`errors_told`], and leaves the group of processes behind it."""
    try:
        with errors_told():
            with_worker_named(main)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextmanager
def errors_told() -> Iterator[None]:
    """
    What a user can put right is printed as one message, and the exit status is 2.

    A launch that every process refuses is spoken of by the first one alone.
    """
    try:
        yield
    except (ValueError, ImportError, OSError, EOFError, MemoryError, RuntimeError, SafetensorError) as error:
        message = explain(error)
        if message is None:
            raise
        if isinstance(error, LaunchError) and not is_first():
            # A launcher ends all processes once one has failed, and the first may still have its message to write.
            time.sleep(SECONDS_FOR_THE_FIRST)
        else:
            rank = int(os.environ.get("RANK", 0))  # as torchrun and accelerate launch set it
            print(f"error{f' on process {rank}' if rank else ''}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
