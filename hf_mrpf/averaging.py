"""Exponential moving average (EMA) of weights: a second set that follows training, and is evaluated and saved."""

import contextlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from .measuring import MeasuringTrainer

# In a checkpoint, whose model.safetensors holds the average: the weights that training goes on from.
TRAINING_WEIGHTS = "training_weights.safetensors"


class WeightAverage(TrainerCallback):
    """
    The average of one training: after step t it is `decay * average + (1 - decay) * weights`, at first the weights.

    Parameters and floating-point buffers, such as BatchNorm's statistics, are averaged; other buffers are copied.

    Args:
        decay (`float`): in (0, 1); about the last `1 / (1 - decay)` steps count.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self._average: AveragedModel | None = None
        self._in_model = False

    # The statistics of BatchNorm have been made the same on all processes by then.
    def on_step_end(self, args, state, control, **kwargs):
        """As in `TrainerCallback`: one more set of weights counts."""
        if self._average is None:
            self._average = self._begin(kwargs["model"])
        self._average.update_parameters(kwargs["model"])

    def forget(self) -> None:
        """Makes ready for another training."""
        self._average = None

    @contextlib.contextmanager
    def in_model(self, model: nn.Module) -> Iterator[None]:
        """Meanwhile `model` holds the average, if there is one; afterwards, bit for bit, what it held before."""
        if self._average is None or self._in_model:
            yield
            return
        self._exchange(self._average.module, model)
        self._in_model = True
        try:
            yield
        finally:
            self._exchange(self._average.module, model)
            self._in_model = False

    def settle(self, model: nn.Module) -> None:
        """Leaves the average in `model`, at the end of a training."""
        if self._average is not None:
            self._exchange(self._average.module, model)
            self.forget()

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes the weights that training goes on from beside the average that `model` must hold now."""
        if self._average is not None:
            save_model(self._average.module, str(folder / TRAINING_WEIGHTS))

    def load(self, model: nn.Module, folder: Path) -> None:
        """Takes the average from `model`, loaded from a checkpoint, and gives it that one's training weights."""
        self._average = self._begin(model)
        self._average.n_averaged.fill_(1)  # else the next step would start the average anew
        load_model(model, str(folder / TRAINING_WEIGHTS))

    def _begin(self, model: nn.Module) -> AveragedModel:
        return AveragedModel(model, multi_avg_fn=_average_into(self.decay), use_buffers=True)

    @staticmethod
    @torch.no_grad()
    def _exchange(one: nn.Module, other: nn.Module) -> None:
        pairs = zip(chain(one.parameters(), one.buffers()), chain(other.parameters(), other.buffers()), strict=True)
        for left, right in pairs:
            kept = left.clone()
            left.copy_(right)
            right.copy_(kept)


def _average_into(decay: float) -> Callable[[Any, Any, Any], None]:
    average = get_ema_multi_avg_fn(decay)

    def update(averages: list[Tensor], weights: list[Tensor], count: Tensor) -> None:
        if averages[0].is_floating_point():
            average(averages, weights, count)
            return
        for mean, weight in zip(averages, weights, strict=True):
            mean.copy_(weight)  # an index that is averaged with itself is rounded down to another one

    return update


class AveragingTrainer(MeasuringTrainer):
    """
    `Trainer` that evaluates and saves the average of the weights, and ends with it, where `ema_decay` is set.

    A checkpoint holds the average as its model and the training weights beside it. What the log says of training
    batches is of the training weights.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._average = WeightAverage(self.args.ema_decay) if self.args.ema_decay is not None else None
        if self._average is not None:
            self.add_callback(self._average)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        if self._average is None:
            return contextlib.nullcontext()
        return self._average.in_model(self.accelerator.unwrap_model(self.model))

    def train(self, *args: Any, **kwargs: Any):
        """As in `Trainer`; the model then holds the average."""
        if self._average is None:
            return super().train(*args, **kwargs)
        self._average.forget()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._average.forget()

    def evaluate(self, *args: Any, **kwargs: Any):
        """As in `Trainer`; also where a callback calls it in mid-training."""
        with self._averaged():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any):
        """As in `Trainer`; also where a callback calls it in mid-training."""
        with self._averaged():
            return super().predict(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Callbacks at an evaluation or a save look at the model that was evaluated or saved.
        needed = self.control.should_evaluate or self.control.should_save
        with self._averaged() if needed else contextlib.nullcontext():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with self._averaged():
            super()._save(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        with self._averaged():
            super()._save_checkpoint(model, trial)
            if self._average is not None and self.args.should_save:
                folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
                self._average.save(self.accelerator.unwrap_model(self.model), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder = Path(resume_from_checkpoint)
        written = (folder / TRAINING_WEIGHTS).is_file()
        if written != (self._average is not None):
            raise ValueError(
                f"The checkpoint {folder} was written {'with' if written else 'without'} ema_decay, and this training "
                f"goes on {'without' if written else 'with'} it; the weights it went on from would be others. "
                f"{'Set' if written else 'Leave out'} ema_decay as then, or start afresh."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._average is not None:
            self._average.load(self.accelerator.unwrap_model(self.model), folder)

    def _finalize_training(self, *args: Any, **kwargs: Any):
        # Before Trainer loads the best checkpoint, which is an average too.
        if self._average is not None:
            self._average.settle(self.accelerator.unwrap_model(self.model))
        return super()._finalize_training(*args, **kwargs)
