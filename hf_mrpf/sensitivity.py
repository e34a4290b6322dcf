"""Module robustness sensitivity (MRS): how much a small change of one module's weights costs in robust loss."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from numbers import Real
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .attacks import AttackConfig, check_pixels, cross_entropy, eval_mode, frozen, keyed_start, logits_of, pgd_attack

SCORED_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True, eq=False)
class SensitivityResult(Mapping[str, float]):
    """
    Sensitivities in nats, as a mapping from module (or group) name to score.

    Args:
        scores (`dict[str, float]`):
            Mean over the calibration sets, each value at least 0, in the order of the model.
        per_set (`tuple[dict[str, float], ...]`):
            The scores of each calibration set alone.
        spearman (`float`, *optional*):
            Mean rank correlation over all pairs of calibration sets, in [-1, 1]: the error bar of the ranking. None where
            it is not defined: one set, one score, or a set whose scores are all equal.
        settings (`dict`):
            All that the scores depend on, JSON-ready, with the robust loss of each set and the number of forward and
            backward passes over a whole set, the attack's included.
    """

    scores: dict[str, float]
    per_set: tuple[dict[str, float], ...]
    spearman: float | None
    settings: dict[str, Any]

    def __getitem__(self, name: str) -> float:
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


class Unit(Protocol):
    """What [`unit_sensitivity`] reads of a pruning unit: its name and the names of its scored members."""

    @property
    def name(self) -> str: ...

    @property
    def members(self) -> Sequence[str]: ...


def module_robustness_sensitivity(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attack: AttackConfig,
    *,
    method: str = "ascent",
    gamma: float = 0.1,
    num_steps: int | None = None,
    seed: int = 0,
    groups: Mapping[str, Sequence[str]] | None = None,
    slices: Mapping[str, tuple[str, slice]] | None = None,
    batch_size: int = 128,
    progress: bool = False,
) -> SensitivityResult:
    """
    Score each module by the rise of the robust loss within a ball around its weights.

    The score of a module with weights `theta` is `max over ||d|| <= gamma * ||theta|| of R(theta + d) - R(theta)`, in nats,
    where R is the mean cross-entropy on adversarial images fixed at the unperturbed weights: the relaxation (section 3.3)
    of Module Robust Criticality, Def. 3.1 and Alg. 1 of [RiFT](https://huggingface.co/papers/2308.02533). Each value is a
    lower bound, at least 0. The model runs in eval mode; its weights, modes and flags are given back bit for bit, also
    after an exception.

    Args:
        model (`nn.Module`):
            Takes pixels in [0, 1] and returns logits, or an output with `.logits`. The weights of its `Conv1d`, `Conv2d`,
            `Conv3d` and `Linear` modules are scored, by `named_modules` name; a weight shared by two is scored once.
        batches (`Iterable[tuple[Tensor, Tensor]]`):
            Calibration sets, each `(images [N, 3, H, W] in [0, 1], labels [N])`; scores are means over them. Two to four
            disjoint sets of 128 images do.
        attack ([`AttackConfig`]):
            Makes the adversarial images; `eps=0` gives the sensitivity of the clean loss.
        method (`str`, *optional*, defaults to `"ascent"`):
            A key of `METHODS`. `"ascent"` and `"exact"` take projected steps along the normalised gradient, each of the
            whole radius, and keep the best value: 3 and 10 of them. `"first_order"` is `gamma * ||theta|| * ||grad R||`,
            from one backward pass for all modules.
        gamma (`float`, *optional*, defaults to `0.1`):
            Radius as a fraction of the weights' norm, in [0, 1].
        num_steps (`int`, *optional*):
            Ascent steps instead of the method's own number.
        seed (`int`, *optional*, defaults to `0`):
            With an image's position in `batches`, keys its random start.
        groups (`Mapping[str, Sequence[str]]`, *optional*):
            Members perturbed together as one vector of radius `gamma * ||theta_group||`, by group name. Scores are then
            those of the groups alone. Defaults to each module by itself.
        slices (`Mapping[str, tuple[str, slice]]`, *optional*):
            Further members that are rows (of dimension 0) of one module's weight, by name, scored like modules.
        batch_size (`int`, *optional*, defaults to `128`):
            Images run at once; larger sets are summed up in parts.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        [`SensitivityResult`].

    Raises:
        ValueError: If an option is unknown or out of range, images are no pixels in [0, 1], labels do not fit them, a
            weight is not finite, there is nothing to score, or the loss stops being finite.
    """
    steps = _check_options(method, gamma, num_steps, batch_size)
    check_finite_weights(model)
    targets = _targets(model, groups, slices)
    weights = _unique(piece.weight for pieces in targets.values() for piece in pieces)
    sets = _calibration_sets(batches)
    per_set, robust_losses, first_image, forwards, backwards = [], [], 0, 0, 0
    with (
        eval_mode(model),
        frozen(model),
        tqdm(total=len(sets) * len(targets), desc="sensitivity", unit="module", disable=not progress) as bar,
    ):
        for images, labels in sets:
            parts = _adversarial_parts(model, images, labels, attack, seed, first_image, batch_size)
            first_image += len(images)
            measure = _RobustLoss(model, parts)
            loss, gradients = measure(weights)
            gradient_of = dict(zip(map(id, weights), gradients, strict=True))
            scores = {}
            for name, pieces in targets.items():
                gradient = [gradient_of[id(piece.weight)][piece.rows] for piece in pieces]
                radius = gamma * _norm([piece.view for piece in pieces])
                if method == "first_order":
                    scores[name] = radius * _norm(gradient)
                else:
                    scores[name] = _ascend(pieces, gradient, radius, steps, measure, loss)
                bar.update()
            attack_steps = attack.num_steps if attack.eps > 0 else 0
            forwards += measure.forwards + attack_steps
            backwards += measure.backwards + attack_steps
            per_set.append(scores)
            robust_losses.append(loss)
    settings = {
        "method": method,
        "gamma": float(gamma),
        "num_steps": steps,
        "seed": seed,
        "attack": asdict(attack) | {"step_size": attack.step},
        "images_per_set": [len(images) for images, _ in sets],
        "batch_size": batch_size,
        "groups": None if groups is None else {name: list(members) for name, members in groups.items()},
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "robust_losses": robust_losses,
        "forwards": forwards,
        "backwards": backwards,
    }
    means = {name: fmean(scores[name] for scores in per_set) for name in targets}
    return SensitivityResult(means, tuple(per_set), _mean_spearman(per_set), settings)


def unit_sensitivity(scores: Mapping[str, float], units: Iterable[Unit], combine: str = "sum") -> dict[str, float]:
    """
    Give each pruning unit one score from those of its members.

    Args:
        scores (`Mapping[str, float]`):
            Scores of every member in nats, such as a [`SensitivityResult`]. Scores by unit name are passed through.
        units (`Iterable[PruningUnit]`):
            Anything with a `name` and `members`.
        combine (`str`, *optional*, defaults to `"sum"`):
            A key of `COMBINERS`: `"sum"`, `"max"` or `"mean"` over the members.

    Returns:
        `dict[str, float]`: unit name to score, in the order of the units.

    Raises:
        ValueError: If `combine` is unknown, a unit has no members, or a member has no score.
    """
    units = list(units)
    unscored = [(unit.name, member) for unit in units for member in unit.members if member not in scores]
    empty = [(unit.name, "") for unit in units if not unit.members]
    if (unscored or empty) and all(unit.name in scores for unit in units):
        return {unit.name: scores[unit.name] for unit in units}
    if combine not in COMBINERS:
        raise ValueError(
            f"combine is {combine!r}; known combiners: {', '.join(COMBINERS)}. Scores of units perturbed as a whole come "
            "from module_robustness_sensitivity(..., groups={unit.name: unit.members for unit in units})."
        )
    if empty:
        raise ValueError(f"unit {empty[0][0]!r} has no members, so no score can be made for it; score it by its name.")
    if unscored:
        raise ValueError(
            f"unit {unscored[0][0]!r} has a member without a score: {unscored[0][1]!r} ({len(unscored)} such in all). "
            "Give scores of all members, or of all units by unit name."
        )
    return {unit.name: COMBINERS[combine]([scores[member] for member in unit.members]) for unit in units}


def check_finite_weights(model: nn.Module) -> None:
    """
    Refuse a model whose parameters hold NaN or infinity, or whose buffers hold NaN (a mask may be infinite).

    Raises:
        ValueError: With the name of the first such tensor.
    """
    tensors = [(name, tensor, True) for name, tensor in model.named_parameters()]
    tensors += [(name, tensor, False) for name, tensor in model.named_buffers()]
    for name, tensor, finite in tensors:
        if not bool((tensor.isfinite() if finite else ~tensor.isnan()).all()):
            raise ValueError(f"tensor {name!r} holds values that are not finite; load or train the model again.")


@dataclass(frozen=True)
class _Piece:
    """Rows of one weight: what is perturbed together is a list of these."""

    weight: nn.Parameter
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def view(self) -> Tensor:
        return self.weight.detach()[self.rows]


@dataclass
class _RobustLoss:
    """Mean loss over one calibration set at the present weights; all sums over images are made here."""

    model: nn.Module
    parts: list[tuple[Tensor, Tensor]]
    forwards: int = 0
    backwards: int = 0

    def __call__(self, weights: Sequence[nn.Parameter] = ()) -> tuple[float, list[Tensor]]:
        """The loss in nats and its gradients for `weights`, 0 for one that the loss does not depend on."""
        count = sum(len(labels) for _, labels in self.parts)
        total, gradients = 0.0, [torch.zeros_like(weight) for weight in weights]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            for images, labels in self.parts:
                with torch.set_grad_enabled(bool(weights)):
                    loss = cross_entropy(logits_of(self.model(images)), labels)
                total += loss.item()
                if weights:
                    shares = torch.autograd.grad(loss, list(weights), allow_unused=True)
                    for gradient, share in zip(gradients, shares, strict=True):
                        if share is not None:
                            gradient.add_(share, alpha=1 / count)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        self.forwards += 1
        self.backwards += bool(weights)
        if not math.isfinite(total):
            raise ValueError("the robust loss is not finite; check the model's outputs, or use a smaller gamma.")
        return total / count, gradients


def _ascend(
    pieces: list[_Piece], gradient: list[Tensor], radius: float, steps: int, measure: _RobustLoss, loss: float
) -> float:
    """Largest rise of the loss met by projected ascent from `gradient`, the one at the unperturbed weights."""
    weights = _unique(piece.weight for piece in pieces)
    originals = [piece.view.clone() for piece in pieces]
    moves = [torch.zeros_like(original) for original in originals]
    best = 0.0
    try:
        for left in reversed(range(steps)):
            length = _norm(gradient)
            if radius == 0 or length == 0:
                break
            moves = [move.add_(part, alpha=radius / length) for move, part in zip(moves, gradient, strict=True)]
            shrink = min(1.0, radius / _norm(moves))
            for piece, original, move in zip(pieces, originals, moves, strict=True):
                piece.view.copy_(original + move.mul_(shrink))
            # One forward gives this step's value and, except at the last, the next step's gradient.
            value, gradients = measure(weights if left else ())
            gradient_of = dict(zip(map(id, weights), gradients, strict=bool(left)))
            gradient = [gradient_of[id(piece.weight)][piece.rows] for piece in pieces if left]
            best = max(best, value - loss)
    finally:
        for piece, original in zip(pieces, originals, strict=True):
            piece.view.copy_(original)
    return best
