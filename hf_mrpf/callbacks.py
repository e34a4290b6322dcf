"""Callbacks of every `MRPFTrainer`: a random stream for each process, and a watch for two kinds of overfitting."""

import logging
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from .attacks import AttackConfig
from .config import MRPFConfig
from .evaluation import evaluate_robustness
from .loader import PixelRows

logger = logging.getLogger(__name__)

# Standard errors of a difference of two accuracies: a difference of pure noise is larger once in a hundred times.
Z = 2.576
# A collapse leaves less than this of the best accuracy; robust overfitting takes tens of per cent of it, not more.
COLLAPSE = 0.5
# Evaluations in a row, so that one bad epoch at a high learning rate is not called robust overfitting.
IN_A_ROW = 2
# Of PGD-20 where the evaluation's own attack does not settle it: about the cost of one training batch a step.
CONFIRMATION_IMAGES = 128


class SeedEachRank(TrainerCallback):
    """Gives every process its own random stream: `Trainer` seeds all alike."""

    def on_train_begin(self, args, state, control, **kwargs):
        # Not earlier: the order of the training data must be drawn from the seed that all ranks share.
        if args.world_size > 1:
            torch.manual_seed(args.seed + 1_000_003 * args.process_index)

    def on_train_end(self, args, state, control, **kwargs):
        # The next training of the same trainer draws its order from this seed, which all ranks must share again.
        if args.world_size > 1:
            torch.manual_seed(args.seed)


@dataclass(frozen=True)
class Reading:
    """
    Robust accuracies at one evaluation, in [0, 1].

    Args:
        accuracy (`float`): of validation images, under `attack`.
        images (`int`): how many validation images.
        attack (`str`): which attack on them, in words.
        train (`float`): of the training images since the evaluation before, under the training attack.
        epoch (`float`): when.
        guess (`float`): accuracy of always guessing the most frequent class.
    """

    accuracy: float
    images: int
    attack: str
    train: float
    epoch: float
    guess: float = 0.0

    @property
    def variance(self) -> float:
        """Of `accuracy`, as the share of so many independent images."""
        return self.accuracy * (1 - self.accuracy) / self.images


def margin(first: Reading, second: Reading) -> float:
    """The difference of two validation accuracies that sampling alone exceeds once in a hundred times, in [0, 1]."""
    return Z * math.sqrt(first.variance + second.variance)


def is_lower(best: Reading, now: Reading) -> bool:
    """Whether validation accuracy lies below its best by more than the margin."""
    # A network that only guesses has a robustness, and may lose it as it begins to learn.
    has_learnt = best.accuracy - best.guess > Z * math.sqrt(best.variance)
    return has_learnt and best.accuracy - now.accuracy > margin(best, now)


def has_fallen(best: Reading, now: Reading) -> bool:
    """Whether validation accuracy is lower than its best, and training accuracy higher."""
    return is_lower(best, now) and now.train > best.train


def has_collapsed(best: Reading, now: Reading) -> bool:
    """Whether validation accuracy is less than half of its best, and training accuracy no lower."""
    # No lower, not higher: a training attack that finds nothing any more may have found nothing at the best, either.
    return is_lower(best, now) and now.accuracy < COLLAPSE * best.accuracy and now.train >= best.train


class OverfittingWatch(TrainerCallback, ExportableState):
    """
    Notices robust and catastrophic overfitting at the evaluations of a training, and warns once of each.

    Both are seen as validation robust accuracy that falls below its best by more than sampling n images explains (2.576
    standard errors of the difference), while accuracy on training images under the training attack does not fall. A
    best that is no better than guessing does not count.

    - *Robust overfitting* ([Rice et al.](https://huggingface.co/papers/2002.11569)): so at two evaluations in a row,
      where accuracy on training images has risen since the best.
    - *Catastrophic overfitting* ([Wong et al.](https://huggingface.co/papers/2001.03994),
      [Andriushchenko and Flammarion](https://huggingface.co/papers/2007.02617)): less than half of the best is left.
      The word is used of PGD-20 alone: where `evaluate()` runs fewer steps, its collapse is confirmed by PGD-20 at its
      usual step size on up to 128 validation images. Where its attack could not show a collapse, with fewer than 5
      steps or steps above eps / 2, that PGD-20 runs at every evaluation.

    It reads `eval_robust_accuracy` and `eval_train_robust_accuracy` (of each validation split, if there are several);
    where the objective attacks nothing it stays silent. Its state travels with checkpoints.

    Attributes:
        warnings (`list[dict]`):
            What was noticed: `kind` (`"robust"` or `"catastrophic"`), `epoch`, `step` and `message`.
    """

    def __init__(self) -> None:
        self.warnings: list[dict[str, Any]] = []
        self.best: dict[str, dict[str, Any]] = {}
        self.fallen: dict[str, int] = {}
        self._train: tuple[int, float] | None = None

    def state(self) -> dict:
        """As in `ExportableState`."""
        return {"args": {}, "attributes": {"warnings": self.warnings, "best": self.best, "fallen": self.fallen}}

    def on_train_begin(self, args, state, control, **kwargs):
        # A checkpoint of an earlier version has no such entry, and Trainer counts on one when it saves.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        attributes = saved["attributes"] if state.global_step else OverfittingWatch().state()["attributes"]
        for name, value in attributes.items():
            setattr(self, name, value)

    def on_evaluate(self, args, state, control, *, metrics=None, model=None, eval_dataloader=None, **kwargs):
        metrics, data = metrics or {}, getattr(eval_dataloader, "dataset", ())
        data = data.dataset if isinstance(data, PixelRows) else data
        split = next(
            (key.removesuffix("_robust_accuracy") for key in metrics if key.endswith("_robust_accuracy")), None
        )
        if split is None or not has_length(data) or not len(data):
            return
        if f"{split}_train_robust_accuracy" in metrics:
            self._train = state.global_step, metrics[f"{split}_train_robust_accuracy"]
        if self._train is None or self._train[0] != state.global_step:
            return
        if not math.isfinite(metrics.get(f"{split}_adversarial_loss_gap", 0.0)):
            return  # broken weights: the next save stops the training, and says which checkpoint is whole
        figures = {"train": self._train[1], "epoch": state.epoch, "guess": _guess(data)}
        seen = f"PGD-{args.eval_num_steps}"
        now = Reading(metrics[f"{split}_robust_accuracy"], len(data), seen, **figures)
        best = self._best(split, now)
        self.fallen[split] = self.fallen.get(split, 0) + 1 if has_fallen(best, now) else 0
        probe = None
        if _is_weak(args) or (args.eval_num_steps < 20 and has_collapsed(best, now)):
            probe = _pgd20(args, model, data, figures)
        if probe and _is_weak(args):
            best = self._best(f"{split} under PGD-20", probe)
        if has_collapsed(best, probe or now) and not self._has_said("catastrophic"):
            self._say("catastrophic", best, probe or now, args, state)
        elif self.fallen[split] >= IN_A_ROW and not self._has_said("robust", "catastrophic"):
            self._say("robust", best if probe is None else Reading(**self.best[split]), now, args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._train = None  # what is evaluated later may be other images

    def _best(self, series: str, now: Reading) -> Reading:
        if series not in self.best or now.accuracy > self.best[series]["accuracy"]:
            self.best[series] = asdict(now)
        return Reading(**self.best[series])

    def _has_said(self, *kinds: str) -> bool:
        return any(warning["kind"] in kinds for warning in self.warnings)

    def _say(self, kind: str, best: Reading, now: Reading, args: MRPFConfig, state: Any) -> None:
        message = f"{_TITLES[kind]}: {_measured(best, now, args)}. {_ADVICE[kind]} {_kept(best, args)}"
        self.warnings.append({"kind": kind, "epoch": state.epoch, "step": state.global_step, "message": message})
        if state.is_world_process_zero:
            logger.warning(message)


def _guess(data: Any) -> float:
    if not isinstance(data, Dataset):
        return 0.0
    return max(Counter(data["labels"][:]).values()) / len(data)


def _is_weak(args: MRPFConfig) -> bool:
    """Whether the evaluation's attack may itself be blind to a collapse."""
    attack = args.eval_attack
    return attack.eps > 0 and (attack.num_steps < 5 or attack.step > 0.5001 * attack.eps)


def _pgd20(args: MRPFConfig, model: nn.Module | None, data: Any, figures: dict[str, Any]) -> Reading | None:
    if model is None or not isinstance(data, Dataset):
        return None
    report = evaluate_robustness(
        model, data, ["pgd20"], AttackConfig(args.norm, args.eps), num_samples=CONFIRMATION_IMAGES, seed=args.seed,
        batch_size=args.per_device_eval_batch_size,
    )  # fmt: skip
    return Reading(report.attacks["pgd20"], report.num_samples, "PGD-20", **figures)


def _measured(best: Reading, now: Reading, args: MRPFConfig) -> str:
    attack = args.attack
    steps = f"{attack.num_steps} step{'s' if attack.num_steps > 1 else ''} of {attack.step:.3g}"
    return (
        f"validation accuracy under {now.attack} is {now.accuracy:.1%} at epoch {now.epoch:.3g} (n = {now.images:,}), "
        f"after {best.accuracy:.1%} under {best.attack} at epoch {best.epoch:.3g} (n = {best.images:,}; noise stays "
        f"within {100 * margin(best, now):.1f} points), while training accuracy under the training attack ({steps}) "
        f"went from {best.train:.1%} to {now.train:.1%}"
    )


def _kept(best: Reading, args: MRPFConfig) -> str:
    if args.load_best_model_at_end:
        return "The checkpoint of the best evaluation is loaded at the end (load_best_model_at_end)."
    return f"The model of epoch {best.epoch:.3g} was better: --load_best_model_at_end would keep it."


_TITLES = {
    "robust": "robust overfitting (arXiv 2002.11569)",
    "catastrophic": "catastrophic overfitting (arXiv 2001.03994, 2007.02617)",
}
_ADVICE = {
    "robust": "Train for fewer epochs, or with more images, augmentation or weight decay.",
    "catastrophic": (
        "The training attack no longer finds what fools the model: give it more steps (--num_steps), a smaller "
        "--step_size or --eps, or a random start."
    ),
}
