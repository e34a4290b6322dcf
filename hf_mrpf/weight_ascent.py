"""Projected gradient ascent on weights: how far the robust loss rises within a ball around a module's weights."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import AttackConfig, computing_in, logits_of
from .calibration import AttackedBatch
from .folding import folded_except
from .prefix import Prefix
from .processes import Processes

LOGGER = logging.getLogger("hf_mrpf")


class Piece(NamedTuple):
    """Rows of one weight; a target, which is what gets perturbed together, is a list of these."""

    weight: nn.Parameter
    rows: slice = slice(None)

    @property
    def view(self) -> Tensor:
        return self.weight.detach()[self.rows]


@dataclass
class RobustLoss:
    """Mean loss over one calibration set at the present weights; every sum over images is made here, in float64."""

    model: nn.Module
    parts: list[AttackedBatch]
    count: int
    attack: AttackConfig  # whose dtype the passes compute in
    processes: Processes
    forwards: int = 0
    backwards: int = 0
    prefixes: list[Prefix] = field(init=False)
    rehearsal: list[Prefix] = field(init=False)
    folded: dict[nn.Module, Any] = field(init=False, default_factory=dict)  # what does not change was folded into
    rehearsed: Tensor | None = field(init=False, default=None)  # logits of the first of these, from a whole pass

    def __post_init__(self) -> None:
        # Not channels last as in an attack: there oneDNN's gradient of the weights of a strided 1x1 convolution of few
        # channels writes outside its memory (uxlfoundation/oneDNN issue 6035); that of images does not.
        self.prefixes = [Prefix(self.model, images, tells=False) for _, images, _ in self.parts]
        one = [images[:1] for _, images, _ in self.parts[:1]]
        self.rehearsal = [Prefix(self.model, image) for image in one]
        self.rehearsal += [Prefix(self.model, 1 - image, tells=False) for image in one]

    @property
    def in_half(self) -> bool:
        """Whether passes may round coarsely: by the dtype of the attack, an autocast that is on, or TF32 on a GPU."""
        device = next(self.model.parameters()).device
        return self.attack.dtype != "float32" or torch.is_autocast_enabled(device.type) or device.type != "cpu"

    @contextmanager
    def changing_only(self, pieces: Sequence[Piece]) -> Iterator[None]:
        """Meanwhile only these weights change: what the network computes before it reads them is kept."""
        weights = list({id(piece.weight): piece.weight for piece in pieces}.values())
        with ExitStack() as forms:
            for prefix in self.prefixes[:1]:
                forms.enter_context(folded_except(self.model, prefix.images, weights, self.in_half, self.folded))
            if self.rehearsal:
                with computing_in(self.attack, self.rehearsal[0].images):
                    self._keep_before(weights)
            yield

    def _keep_before(self, weights: Sequence[nn.Parameter]) -> None:
        agree = self._passes_agree(weights)
        for prefix in self.prefixes:
            if agree:
                prefix.stop_before(weights)
            else:
                prefix.let_go()

    def _passes_agree(self, weights: Sequence[nn.Parameter]) -> bool:
        """
        Whether passes from the weights on give what a whole one gives, as single images show: they cost little.

        A module may do more than return a value: leave something for another to find, or count its calls.
        """
        device = weights[0].device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            for prefix in self.rehearsal:
                prefix.stop_before(weights)
            prefix = self.rehearsal[0]
            try:
                # Twice, as what is kept must not change; after the other image, as nothing of that must be found.
                # Copies: a network compiled into CUDA graphs writes its next output over the last one.
                kept = [logits_of(prefix()).clone() for _ in range(2)]
                reason = "gives other logits"
            except Exception as error:  # whatever the network's own code raises where a part of it was left out
                kept, reason = [], f"raises {type(error).__name__}"
            # One whole pass serves every target: what is folded for each only changes the rounding.
            if self.rehearsed is None or self.in_half:
                self.rehearsed = logits_of(self.model(prefix.images)).clone()
        if kept and all(_is_close(logits, self.rehearsed) for logits in kept):
            return True
        for prefix in self.rehearsal:
            prefix.let_go()
        LOGGER.info(
            "Passes of this %s are whole ones: it %s without what comes first.", type(self.model).__name__, reason
        )
        return False

    def __call__(self, pieces: Sequence[Piece] = ()) -> tuple[float, list[Tensor]]:
        """The loss in nats and its gradient for each piece, 0 for one that the loss does not depend on."""
        weights = list({id(piece.weight): piece.weight for piece in pieces}.values())
        gradients = {id(weight): torch.zeros_like(weight) for weight in weights}
        # Scores are small differences of losses: a float32 sum would lose their last digits.
        total = 0.0
        for weight in weights:
            weight.requires_grad_(True)
        try:
            for prefix, (_, _, labels) in zip(self.prefixes, self.parts, strict=True):
                with torch.set_grad_enabled(bool(weights)), computing_in(self.attack, prefix.images):
                    losses = F.cross_entropy(logits_of(prefix()), labels, reduction="none")
                    loss = losses.sum()
                total += losses.detach().cpu().double().sum().item()
                if weights:
                    # Without a name: it would keep one part's gradients alive during the next part's passes.
                    for gradient, share in zip(
                        gradients.values(), torch.autograd.grad(loss, weights, allow_unused=True), strict=True
                    ):
                        if share is not None:
                            gradient.add_(share, alpha=1 / self.count)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        total = self.processes.total(total, next(self.model.parameters()).device)
        self.processes.sum_(list(gradients.values()))
        self.forwards += 1
        self.backwards += bool(weights)
        if not math.isfinite(total):
            raise ValueError("the robust loss is not finite; check the model's logits, or lower gamma.")
        return total / self.count, [gradients[id(piece.weight)][piece.rows] for piece in pieces]


def _is_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-3 * float(other.abs().max()), equal_nan=True)


def ascend(
    pieces: list[Piece], gradient: list[Tensor], radius: float, steps: int, measure: RobustLoss, loss: float
) -> float:
    """Largest rise met by projected ascent; `gradient` and `loss` are those at the unperturbed weights."""
    originals = [piece.view.clone() for piece in pieces]
    moves = [torch.zeros_like(original) for original in originals]
    best = 0.0
    try:
        for left in reversed(range(steps)):
            length = norm(gradient)
            if radius == 0 or length == 0:
                break
            for move, part in zip(moves, gradient, strict=True):
                move.add_(part / length, alpha=radius)
            shrink = radius / max(radius, norm(moves))
            for piece, original, move in zip(pieces, originals, moves, strict=True):
                piece.view.copy_(original + move.mul_(shrink))
            # One forward gives this step's value and, except at the last, the next step's gradient.
            value, gradient = measure(pieces if left else ())
            best = max(best, value - loss)
    finally:
        for piece, original in zip(pieces, originals, strict=True):
            piece.view.copy_(original)
    return best


def norm(tensors: Iterable[Tensor]) -> float:
    """l2 norm of all tensors as one vector."""
    return math.hypot(*(tensor.norm().item() for tensor in tensors))
