"""What is left of a network at any widths: its size, and copies that are pruned, repaired and recalibrated."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .allocation import Widths
from .attacks import AttackConfig, logits_of
from .batchnorm import recalibrate_batchnorm
from .calibration import attacked_batches
from .modes import eval_mode
from .processes import Processes
from .progress import Bar
from .repair import input_moments, refit_layers, repairable_layers
from .units import UnitGraph, cut

Sets = list[tuple[Tensor, Tensor]]


class PrunedCopies:
    """
    Makes what pruning would leave of a model at given widths. The model itself stays as it is.

    The second moments of all layers that a repair may refit are held in memory once they are needed: 8 bytes times the
    square of the inputs of each.

    Args:
        model (`nn.Module`): the dense model, in any mode.
        graph ([`UnitGraph`]): its units.
        keep (`Callable[[dict[str, int]], dict[str, Any]]`): which channels stay at given widths, as in `PruningPlan`.
        metric (`str`): what `size` counts, `"macs"` or `"params"`.
        batches (`list[tuple[Tensor, Tensor]]`): calibration sets `(images [N, 3, H, W] in [0, 1], labels [N])`.
        attack ([`AttackConfig`]): makes the adversarial images that a repair is fitted on beside the clean ones.
        options (`Mapping[str, Sequence[int]]`): allowed widths of each unit, increasing.
        seed (`int`): of the attack's starts.
        bar ([`Bar`]): told of every copy.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: UnitGraph,
        keep: Callable[[Widths], dict[str, Any]],
        metric: str,
        batches: Sets,
        attack: AttackConfig,
        options: Mapping[str, Sequence[int]],
        *,
        seed: int,
        bar: Bar,
    ):
        self.model, self.graph, self.keep, self.metric = model, graph, keep, metric
        self.batches, self.attack, self.seed = batches, attack, seed
        self._smallest = {name: widths[0] for name, widths in options.items()}
        self._moments: dict[str, Tensor] | None = None
        self._bar = bar

    def size(self, widths: Mapping[str, int]) -> int:
        """MACs per image or parameters, by `metric`, at the given channels of units; a unit not named keeps all."""
        return self.graph.size(widths)[self.metric]

    def at(self, widths: Mapping[str, int], *, repaired: bool = True) -> nn.Module:
        """
        A copy that is pruned to `widths` (a unit not named keeps all), with its BatchNorm statistics measured again.

        `repaired` says whether what reads the removed channels is refitted as [`repair`] does, to moments of the dense
        model that are measured once for all copies.
        """
        kept = self.keep(dict(widths))
        pruned = copy.deepcopy(self.model)
        cut(pruned, self.graph, kept)
        if repaired:
            layers, _ = repairable_layers(self.model, self.graph, kept)
            refit_layers(pruned, self.model, self.graph, kept, layers, self._all_moments().__getitem__)
        recalibrate_batchnorm(pruned, self.batches)
        self._bar.update()
        return pruned

    def to_come(self, copies: int) -> None:
        """Says how many more copies are expected, for the progress bar."""
        self._bar.total = self._bar.n + copies

    def _all_moments(self) -> dict[str, Tensor]:
        if self._moments is None:
            layers, _ = repairable_layers(self.model, self.graph, self.keep(self._smallest))
            self._moments = input_moments(
                self.model, layers, self.batches, self.attack, seed=self.seed, processes=Processes()
            )
        return self._moments


def robust_loss(model: nn.Module, batches: Sets, attack: AttackConfig, *, seed: int = 0) -> float:
    """
    Mean cross-entropy in nats over adversarial images that are made on this very model, in eval mode.

    Args:
        model (`nn.Module`): takes pixels in [0, 1].
        batches (`list[tuple[Tensor, Tensor]]`): calibration sets `(images [N, 3, H, W], labels [N])`.
        attack ([`AttackConfig`]): with `eps=0` the loss is the clean one.
        seed (`int`, *optional*, defaults to 0): keys the random starts, which are the same for every model.
    """
    total, count = 0.0, 0
    with eval_mode(model):
        for _, adversarial, labels in attacked_batches(model, batches, attack, seed=seed):
            with torch.no_grad():
                total += F.cross_entropy(logits_of(model(adversarial)).float(), labels, reduction="sum").item()
            count += len(labels)
    if count == 0:
        raise ValueError("batches are empty; a loss needs at least one calibration set (images, labels).")
    return total / count
