"""What goes to the Trainer's reporters: figures of training batches, and of a pruning and each of its steps."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback

from .objectives import ObjectiveOutput
from .plan import PruningPlan

# On training batches: clean and adversarial logits that came with them, those of both together, and what is summed.
_COUNTS = ("clean", "adversarial", "both", "right", "robust", "gap")


class TrainingMeter:
    """
    Sums over training batches, kept on the device: nothing waits for them until they are read.

    Two readers have their own sums, the log and the evaluation, since they need not come at the same steps. Figures are
    those of the training forwards: augmented images, BatchNorm on the batch, weights as they were at each step.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, output: ObjectiveOutput, labels: Tensor) -> None:
        """Counts one batch: what the objective returned, and the labels `[N]`."""
        clean, adversarial = output.logits, output.adversarial_logits
        nothing = labels.new_zeros((), dtype=torch.float32)
        images = nothing + len(labels)
        right = robust = gap = nothing
        if clean is not None:
            right = (clean.argmax(1) == labels).sum()
        if adversarial is not None:
            robust = (adversarial.argmax(1) == labels).sum()
        if clean is not None and adversarial is not None:
            losses = [F.cross_entropy(logits.float(), labels, reduction="sum") for logits in (adversarial, clean)]
            gap = losses[0] - losses[1]
        counts = [images if given else nothing for given in (clean is not None, adversarial is not None)]
        row = torch.stack([*counts, counts[0] * counts[1] / images, right, robust, gap])
        for reader in ("log", "evaluation"):
            self._sums[reader] = row + self._sums[reader] if reader in self._sums else row

    def read(self, reader: str, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """
        The figures since this reader's last reading, over the batches of all processes.

        Args:
            reader (`str`): `"log"` or `"evaluation"`.
            reduce (`Callable[[Tensor], Tensor]`): sums a tensor over the processes; called where batches were counted.

        Returns:
            `dict[str, float]`: `train_accuracy` where the objective ran clean images, `train_robust_accuracy` where it
            ran adversarial ones, and where both `adversarial_loss_gap`: adversarial minus clean cross-entropy, in nats.
        """
        if reader not in self._sums:
            return {}
        sums = dict(zip(_COUNTS, reduce(self._sums.pop(reader)).tolist(), strict=True))
        figures = {
            "train_accuracy": ("right", "clean"),
            "train_robust_accuracy": ("robust", "adversarial"),
            "adversarial_loss_gap": ("gap", "both"),
        }
        return {name: sums[total] / sums[count] for name, (total, count) in figures.items() if sums[count]}


def plan_figures(plan: PruningPlan) -> dict[str, float]:
    """
    A plan as one row of the log.

    Returns:
        `dict[str, float]`: `mrs/<unit>` and `module_mrs/<module>` in nats, where they were measured; `pruned/<unit>`,
        the fraction removed, and `width/<unit>`, the channels kept; `kept/macs` and `kept/params` (and `kept/latency`
        where it was measured), fractions of the model before, and `size/macs` and `size/params` after.
    """
    widths = {unit.name: round(unit.width * (1 - plan.ratios[unit.name])) for unit in plan.units}
    groups: dict[str, Mapping[str, float]] = {
        "mrs": plan.scores,
        "module_mrs": plan.module_scores,
        "pruned": plan.ratios,
        "width": widths,
        "kept": plan.achieved,
        "size": plan.after,
    }
    return {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}


@contextmanager
def open_reporters(trainer: Trainer) -> Iterator[None]:
    """
    Lets a trainer log outside `train()`: TensorBoard and Trackio open where a training begins and close where it ends.

    Without it TensorBoard writes to `runs` in the present folder, and neither is ever closed.
    """
    reporters: list[Any] = [
        callback
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, TensorBoardCallback | TrackioCallback)
    ]
    for reporter in reporters:
        reporter.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    try:
        yield
    finally:
        for reporter in reporters:
            reporter.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def end_of_run(args: TrainingArguments) -> None:
    """Ends the run of Weights & Biases, which else lasts as long as the process: each stage is a run of its own."""
    wandb = sys.modules.get("wandb")
    if "wandb" in (args.report_to or []) and wandb is not None and wandb.run is not None:
        wandb.finish()
