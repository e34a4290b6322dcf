"""Ctrl-C and SIGTERM in a recipe: training stops between two steps, saved, and the message says how to go on."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType

import torch
from transformers import TrainerCallback

from .tokens import words_without_tokens

# Of the processes of a run one may get both: a terminal's Ctrl-C is a SIGINT to all, and launchers pass SIGTERM on.
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes on what its processes got as well: only a later signal is a second press.
_ECHO = 1.0
# How a launcher is called on a card, by its program or module.
_LAUNCHERS = {
    "accelerate": "accelerate",
    "accelerate-launch": "accelerate launch",
    "accelerate.commands.launch": "accelerate launch",
    "torchrun": "torchrun",
    "torch.distributed.run": "torchrun",
}


class Interrupted(KeyboardInterrupt):
    """Raised where a run stops on a signal; `saved` is the checkpoint that was written for it, if any."""

    def __init__(self, signum: int, saved: Path | None = None):
        super().__init__(signum, saved)
        self.signum = signum
        self.saved = saved


class _Request:
    """The signal that came, and whether it is to wait for the end of a training step."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.signum, self.since, self.waits = 0, 0.0, False
        self.process = os.getpid()

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a worker of a data loader: the step that is to be finished needs it
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                signal.raise_signal(signum)
            return
        again, now = self.signum, time.monotonic()
        if again and now - self.since < _ECHO:
            return
        self.signum, self.since = again or signum, now
        if again or not self.waits:
            raise Interrupted(self.signum)
        if _is_first():
            # Not print(): the signal may have come in the middle of another one.
            os.write(2, b"\nstopping: the present step is finished and a checkpoint saved; once more ends at once\n")


_request = _Request()


@contextmanager
def stopping_between_steps() -> Iterator[None]:
    """Within, a signal waits for [`StopBetweenSteps`]; one that comes after the last step is raised at the end."""
    _request.waits = True
    try:
        yield
    finally:
        _request.waits = False
    if _request.signum:
        raise Interrupted(_request.signum)


class StopBetweenSteps(TrainerCallback):
    """
    Ends training after the present step with a checkpoint, once any process has got a signal.

    The `enable_jit_checkpoint` of transformers is no help here: it knows SIGTERM alone, each process decides by its own
    clock, so that several save at different steps, and it saves before the optimizer's step and the evaluation that
    belong to the checkpoint, which a resumed run would then miss.
    """

    def on_step_end(self, args, state, control, **kwargs):
        # After the last step of an epoch comes its evaluation, which picks the best checkpoint: on_epoch_end follows.
        last = control.should_training_stop or float(state.epoch).is_integer()
        if self._agreed(args) and not last:
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._agreed(args):
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if signum := self._agreed(args):
            raise Interrupted(signum, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    @staticmethod
    def _agreed(args) -> int:
        """The signal that any process got, the same on all of them; else 0."""
        if args.world_size == 1:
            return _request.signum
        got = _SIGNALS.index(_request.signum) + 1 if _request.signum else 0
        flag = torch.tensor(got, device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return _SIGNALS[int(flag) - 1] if flag else 0


def resumable(main: Callable[[], None]) -> Callable[[], None]:
    """
    `main` of a recipe that goes on where it was, ended well by Ctrl-C and SIGTERM.

    The exit status is then 130 or 143, and one message says how to go on. Signals are as before outside of it, and one
    that is ignored, as a shell has its background processes ignore Ctrl-C, stays so.
    """

    @wraps(main)
    def run() -> None:
        heeded = [signum for signum in _SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
        _request.forget()
        before = {signum: signal.signal(signum, _request.handle) for signum in heeded}
        try:
            main()
        except Interrupted as stop:
            if _is_first():
                print(farewell(stop), file=sys.stderr, flush=True)
            raise SystemExit(128 + stop.signum) from None
        finally:
            _request.forget()
            for signum, handler in before.items():
                signal.signal(signum, handler)

    return run


def farewell(stop: Interrupted) -> str:
    """What the user reads at the end."""
    saved = f" Saved: {stop.saved}." if stop.saved else " What was finished is kept."
    return f"\nstopped by {signal.Signals(stop.signum).name}.{saved} The same command goes on:\n\n    {own_command()}\n"


def own_command() -> str:
    """The command that started this run, with its launcher where that can be told; without a token."""
    return _shown(_launcher() or sys.orig_argv)


def repeatable_command() -> str:
    """The same without what is of this machine, for a card: `accelerate launch`, where the launcher cannot be told."""
    words = _launcher()
    for place, word in enumerate(words):
        if name := _LAUNCHERS.get(Path(word).name):
            return f"{name} {_shown(words[place + 1 :])}"
    return f"accelerate launch {_shown(sys.argv)}"


def _launcher() -> list[str]:
    """The words of the command that started this process, where it named the script and what that is given."""
    file = Path(f"/proc/{os.getppid()}/cmdline")
    words = file.read_text(errors="replace").rstrip("\0").split("\0") if file.is_file() else []
    # torchrun and accelerate name the script as this process was given it.
    ours = sys.argv[0] in words and words[words.index(sys.argv[0]) + 1 :] == sys.argv[1:]
    return words if ours else []


def _shown(words: list[str]) -> str:
    # Given again, the option would start the run from its beginning.
    kept = (word for word in words if not word.startswith("--overwrite_output_dir"))
    return shlex.join(words_without_tokens(kept))


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
