"""Everything but training in one call: scores, plan, removal, repair, BatchNorm statistics."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attacks import AttackConfig, logits_of
from .batchnorm import recalibrate_batchnorm
from .calibration import attacked_batches, calibration_sets
from .modes import eval_mode
from .pruning import PruningPlan, plan_pruning, prune
from .repair import RepairReport, repair


@dataclass(frozen=True)
class CompressionReport:
    """
    What each step of [`compress`] did to the accuracy on the calibration images (not on test images).

    Attributes:
        accuracy (`dict[str, dict[str, float]]`):
            `"clean"` and `"robust"` accuracy in [0, 1] after each step: `"dense"`, `"pruned"`, `"repaired"`,
            `"recalibrated"`. Each model is attacked anew.
        repair ([`RepairReport`]): per layer.
    """

    accuracy: dict[str, dict[str, float]]
    repair: RepairReport


def compress(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    target: float = 0.5,
    *,
    attack: AttackConfig | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[PruningPlan, CompressionReport]:
    """
    Prune a model to a fraction of its cost without training it, in place.

    Args:
        model (`nn.Module`):
            Takes pixels in [0, 1] and returns logits, or an output with `.logits`.
        batches (`Iterable[tuple[Tensor, Tensor]]`):
            Calibration sets of training images `[N, 3, H, W]` in [0, 1] and labels `[N]`; BatchNorm statistics are
            measured on them too, clean.
        target (`float`, *optional*, defaults to 0.5):
            Fraction of the target metric to KEEP, in (0, 1).
        attack ([`AttackConfig`], *optional*):
            Defaults to `AttackConfig()`.
        seed (`int`, *optional*, defaults to 0):
            Of the attack's starts.
        options:
            Further keywords of [`plan_pruning`].

    Returns:
        `tuple[PruningPlan, CompressionReport]`.

    Raises:
        ValueError: If `batches` are no calibration sets, or as [`plan_pruning`] and [`recalibrate_batchnorm`] do; the
            model is unchanged then.
    """
    attack = attack or AttackConfig()
    sets = calibration_sets(batches)
    plan = plan_pruning(model, sets[0][0][:1], target=target, batches=sets, attack=attack, seed=seed, **options)
    accuracy = {"dense": _accuracy(model, sets, attack, seed)}
    pruned = prune(copy.deepcopy(model), plan)
    accuracy["pruned"] = _accuracy(pruned, sets, attack, seed)
    repaired = repair(pruned, model, plan, sets, attack, seed=seed)
    accuracy["repaired"] = _accuracy(pruned, sets, attack, seed)
    recalibrate_batchnorm(pruned, sets)
    accuracy["recalibrated"] = _accuracy(pruned, sets, attack, seed)
    # Only now that nothing can be refused any more.
    prune(model, plan)
    with torch.no_grad():
        for own, found in zip(_tensors(model), _tensors(pruned), strict=True):
            own.copy_(found)
    return plan, CompressionReport(accuracy, repaired)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _accuracy(model: nn.Module, sets: list[tuple[Tensor, Tensor]], attack: AttackConfig, seed: int) -> dict[str, float]:
    clean = robust = total = 0
    with eval_mode(model):
        for images, adversarial, labels in attacked_batches(model, sets, attack, seed=seed):
            with torch.no_grad():
                clean += int((logits_of(model(images)).argmax(1) == labels).sum())
                robust += int((logits_of(model(adversarial)).argmax(1) == labels).sum())
            total += len(images)
    return {"clean": clean / total, "robust": robust / total}
