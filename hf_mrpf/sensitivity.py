"""Module robustness sensitivity (MRS): how much a small change of one module's weights costs in robust loss."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, islice
from numbers import Real
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .attacks import AttackConfig, check_pixels, eval_mode, frozen, keyed_start, logits_of, pgd_attack
from .attention import attention_slices

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
            Mean rank correlation over all pairs of sets, in [-1, 1]: the error bar of the ranking. None where it is not
            defined: a single set, a single score, or a set whose scores are all equal.
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

    The score of weights `theta` is `max over ||d|| <= gamma * ||theta|| of R(theta + d) - R(theta)`, in nats, where R
    is the mean cross-entropy on adversarial images fixed at the unperturbed weights: the relaxation (section 3.3) of
    Module Robust Criticality, Def. 3.1 and Alg. 1 of [RiFT](https://huggingface.co/papers/2308.02533). A value is a
    lower bound, at least 0. The model runs in eval mode and gets its weights, modes and flags back bit for bit, also
    after an exception.

    Args:
        model (`nn.Module`):
            Takes pixels in [0, 1] and returns logits, or an output with `.logits`. The weights of its convolutions and
            `Linear` modules are scored, by `named_modules` name; a weight that two modules share is scored once.
        batches (`Iterable[tuple[Tensor, Tensor]]`):
            Calibration sets, each `(images [N, 3, H, W] in [0, 1], labels [N])`; scores are means over the sets.
        attack ([`AttackConfig`]):
            Makes the adversarial images; `eps=0` gives the sensitivity of the clean loss.
        method (`str`, *optional*, defaults to `"ascent"`):
            A key of `METHODS`. `"ascent"` and `"exact"` take 3 and 10 projected steps along the normalised gradient,
            each of the whole radius, and keep the best value. `"first_order"` is `gamma * ||theta|| * ||grad R||`,
            every module from one backward pass.
        gamma (`float`, *optional*, defaults to `0.1`):
            Radius as a fraction of the weights' norm, in [0, 1].
        num_steps (`int`, *optional*):
            Ascent steps instead of the method's own number.
        seed (`int`, *optional*, defaults to `0`):
            Keys the random start of an image, together with its position in `batches`.
        groups (`Mapping[str, Sequence[str]]`, *optional*):
            Members perturbed together as one vector of radius `gamma * ||theta_group||`, by group name; the scores are
            then those of the groups. Defaults to each module by itself.
        slices (`Mapping[str, tuple[str, slice]]`, *optional*):
            Further members: rows (of dimension 0) of one module's weight, by name. Defaults to the queries, keys and
            values of fused projections, as `name:q`, `name:k` and `name:v`.
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
    slices = attention_slices(model) if slices is None else slices
    targets = _targets(model, groups, slices)
    every_piece = [piece for pieces in targets.values() for piece in pieces]
    sets = _calibration_sets(batches)
    attack_passes = attack.num_steps if attack.eps > 0 else 0
    per_set, robust_losses, done, forwards, backwards = [], [], 0, 0, 0
    with (
        eval_mode(model),
        frozen(model),
        tqdm(total=len(sets) * len(targets), desc="sensitivity", unit="module", disable=not progress) as bar,
    ):
        for images, labels in sets:
            parts = _adversarial_parts(model, images, labels, attack, seed, done, batch_size)
            measure = _RobustLoss(model, parts)
            loss, gradients = measure(every_piece)
            remaining, scores = iter(gradients), {}
            for name, pieces in targets.items():
                gradient = list(islice(remaining, len(pieces)))
                radius = gamma * _norm(piece.view for piece in pieces)
                if method == "first_order":
                    scores[name] = radius * _norm(gradient)
                else:
                    scores[name] = _ascend(pieces, gradient, radius, steps, measure, loss)
                bar.update()
            done += len(images)
            forwards += attack_passes + measure.forwards
            backwards += attack_passes + measure.backwards
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
        "groups": {name: list(members) for name, members in (groups or {}).items()},
        "slices": {name: [module, rows.start, rows.stop] for name, (module, rows) in (slices or {}).items()},
        "dtype": str(every_piece[0].weight.dtype).removeprefix("torch."),
        "robust_losses": robust_losses,
        "forwards": forwards,
        "backwards": backwards,
    }
    means = {name: fmean(scores[name] for scores in per_set) for name in targets}
    return SensitivityResult(means, tuple(per_set), _mean_spearman(per_set), settings)


def unit_sensitivity(scores: Mapping[str, float], units: Iterable[Any], combine: str = "sum") -> dict[str, float]:
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
        ValueError: If `combine` is unknown or a member has no score.
    """
    units = list(units)
    names = {unit.name for unit in units}
    unscored = [(unit.name, member) for unit in units for member in unit.members if member not in scores]
    # A unit may be called after one of its members: only a score of another member tells that scores are by module.
    by_module = any(member in scores and member not in names for unit in units for member in unit.members)
    if unscored and not by_module and names <= scores.keys():
        return {unit.name: scores[unit.name] for unit in units}
    if combine not in COMBINERS:
        raise ValueError(
            f"combine is {combine!r}; known combiners: {', '.join(COMBINERS)}. Joint scores are measured with "
            "module_robustness_sensitivity(..., groups={unit.name: unit.members for unit in units})."
        )
    if unscored:
        raise ValueError(
            f"member {unscored[0][1]!r} of unit {unscored[0][0]!r} has no score ({len(unscored)} such members in all); "
            "give scores of all members by module name, or of all units by unit name."
        )
    return {unit.name: COMBINERS[combine]([scores[member] for member in unit.members]) for unit in units}


def check_finite_weights(model: nn.Module) -> None:
    """
    Refuse a model whose parameters hold NaN or infinity, or whose buffers hold NaN (a mask may be infinite).

    Raises:
        ValueError: With the name of the first such tensor.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"parameter {name!r} holds NaN or infinity; load or train the model again.")
    for name, buffer in model.named_buffers():
        if buffer.isnan().any():
            raise ValueError(f"buffer {name!r} holds NaN; load or train the model again.")


class _Piece(NamedTuple):
    """Rows of one weight; a target, which is what gets perturbed together, is a list of these."""

    weight: nn.Parameter
    rows: slice = slice(None)

    @property
    def view(self) -> Tensor:
        return self.weight.detach()[self.rows]


@dataclass
class _RobustLoss:
    """Mean loss over one calibration set at the present weights; every sum over images is made here."""

    model: nn.Module
    parts: list[tuple[Tensor, Tensor]]
    forwards: int = 0
    backwards: int = 0

    def __call__(self, pieces: Sequence[_Piece] = ()) -> tuple[float, list[Tensor]]:
        """The loss in nats and its gradient for each piece, 0 for one that the loss does not depend on."""
        weights = list({id(piece.weight): piece.weight for piece in pieces}.values())
        count = sum(len(labels) for _, labels in self.parts)
        total, gradients = 0.0, {id(weight): torch.zeros_like(weight) for weight in weights}
        for weight in weights:
            weight.requires_grad_(True)
        try:
            for images, labels in self.parts:
                with torch.set_grad_enabled(bool(weights)):
                    losses = F.cross_entropy(logits_of(self.model(images)), labels, reduction="none")
                    loss = losses.sum()
                # Scores are small differences of losses: a float32 sum would lose their last digits.
                total += losses.detach().cpu().double().sum().item()
                if weights:
                    # Without a name: it would keep one part's gradients alive during the next part's passes.
                    for gradient, share in zip(
                        gradients.values(), torch.autograd.grad(loss, weights, allow_unused=True), strict=True
                    ):
                        if share is not None:
                            gradient.add_(share, alpha=1 / count)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        self.forwards += 1
        self.backwards += bool(weights)
        if not math.isfinite(total):
            raise ValueError("the robust loss is not finite; check the model's logits, or lower gamma.")
        return total / count, [gradients[id(piece.weight)][piece.rows] for piece in pieces]


def _ascend(
    pieces: list[_Piece], gradient: list[Tensor], radius: float, steps: int, measure: _RobustLoss, loss: float
) -> float:
    """Largest rise met by projected ascent; `gradient` and `loss` are those at the unperturbed weights."""
    originals = [piece.view.clone() for piece in pieces]
    moves = [torch.zeros_like(original) for original in originals]
    best = 0.0
    try:
        for left in reversed(range(steps)):
            length = _norm(gradient)
            if radius == 0 or length == 0:
                break
            for move, part in zip(moves, gradient, strict=True):
                move.add_(part / length, alpha=radius)
            shrink = radius / max(radius, _norm(moves))
            for piece, original, move in zip(pieces, originals, moves, strict=True):
                piece.view.copy_(original + move.mul_(shrink))
            # One forward gives this step's value and, except at the last, the next step's gradient.
            value, gradient = measure(pieces if left else ())
            best = max(best, value - loss)
    finally:
        for piece, original in zip(pieces, originals, strict=True):
            piece.view.copy_(original)
    return best


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(tensor.norm().item() for tensor in tensors))


def _check_options(method: str, gamma: float, num_steps: int | None, batch_size: int) -> int:
    """The number of ascent steps, once every option is known to be usable."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; known methods: {', '.join(METHODS)}.")
    if isinstance(gamma, bool) or not isinstance(gamma, Real) or not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma!r}; it must be a fraction of the weights' norm in [0, 1], such as 0.1.")
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")
    if num_steps is not None and METHODS[method] == 0:
        raise ValueError(f"num_steps is {num_steps}, but {method!r} takes no steps: leave it out or choose 'ascent'.")
    return METHODS[method] if num_steps is None else num_steps


def _targets(
    model: nn.Module, groups: Mapping[str, Sequence[str]] | None, slices: Mapping[str, tuple[str, slice]] | None
) -> dict[str, list[_Piece]]:
    """What is perturbed together, by name: each weight, each named slice of one; or groups of these."""
    members: dict[str, _Piece] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, SCORED_MODULES):
            continue
        if not isinstance(module.weight, nn.Parameter):
            raise ValueError(f"the weight of module {name!r} is computed (parametrized); make it plain before scoring.")
        if id(module.weight) not in seen:
            seen.add(id(module.weight))
            members[name] = _Piece(module.weight)
    for name, (module_name, rows) in (slices or {}).items():
        if module_name not in members:
            raise ValueError(
                f"slice {name!r} is of {module_name!r}, which is not scored; scored: {', '.join(members)}."
            )
        members[name] = _Piece(members[module_name].weight, rows)
    if not members:
        known = ", ".join(kind.__name__ for kind in SCORED_MODULES)
        raise ValueError(f"{type(model).__name__} has no module to score; a {known} is needed.")
    if groups is None:
        return {name: [piece] for name, piece in members.items()}
    for group, names in groups.items():
        unknown = [name for name in names if name not in members]
        if unknown or not names:
            wrong = f"the unknown member {unknown[0]!r}" if unknown else "no members"
            raise ValueError(f"group {group!r} has {wrong}; known members: {', '.join(members)}.")
        pieces = [members[name] for name in names]
        perturbed = [(id(weight), row) for weight, rows in pieces for row in range(len(weight))[rows]]
        if len(perturbed) != len(set(perturbed)):
            raise ValueError(f"members of group {group!r} overlap; name each weight, or slices of it, once.")
    return {group: [members[name] for name in names] for group, names in groups.items()}


def _calibration_sets(batches: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    sets = list(batches)
    if not sets:
        raise ValueError("batches is empty; at least one calibration set (images, labels) is needed.")
    for entry in sets:
        if not isinstance(entry, tuple | list) or len(entry) != 2:
            raise ValueError(f"batches holds a {type(entry).__name__}; each entry must be a pair (images, labels).")
        images, labels = entry
        check_pixels(images)
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or len(labels) == 0 or labels.min() < 0:
            raise ValueError(
                f"labels are {labels.dtype} of shape {list(labels.shape)} for images of shape {list(images.shape)}; at "
                "least one image is needed, and for each one int64 class index of at least 0."
            )
    return sets


def _adversarial_parts(
    model: nn.Module, images: Tensor, labels: Tensor, attack: AttackConfig, seed: int, first: int, batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """Adversarial images of one set and their labels, in micro-batches on the model's device."""
    device = next(model.parameters()).device
    parts = []
    for x, y in zip(images.to(device).split(batch_size), labels.to(device).split(batch_size), strict=True):
        start = keyed_start(x, range(first, first + len(x)), attack, seed)
        parts.append((pgd_attack(model, x, y, attack, start=start), y))
        first += len(x)
    return parts


def _mean_spearman(per_set: Sequence[Mapping[str, float]]) -> float | None:
    ranks = [_ranks(torch.tensor(list(scores.values()), dtype=torch.float64)) for scores in per_set]
    pairs = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in combinations(ranks, 2) if len(pair[0]) > 1]
    return fmean(pairs) if pairs and all(map(math.isfinite, pairs)) else None


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1; ties share their mean rank."""
    _, position, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[position]


# Ascent steps of each method.
METHODS: dict[str, int] = {"ascent": 3, "exact": 10, "first_order": 0}
COMBINERS: dict[str, Callable[[Sequence[float]], float]] = {"sum": math.fsum, "max": max, "mean": fmean}
