"""Module robustness sensitivity (MRS): how much a small change of one module's weights costs in robust loss."""

import copy
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, islice
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn

from .attacks import AttackConfig, check_attack
from .attention import attention_slices
from .calibration import attacked_batches, calibration_sets
from .fingerprint import answers_of, images_sha256, weights_sha256
from .journal import Journal
from .modes import eval_mode, frozen, placed
from .prefix import ReadingOrder
from .processes import Processes
from .progress import progress_bar
from .weight_ascent import Piece, RobustLoss, ascend, norm

SCORED_MODULES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


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
    distributed: bool = False,
    journal: Path | str | None = None,
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
            `Linear` modules are scored, by `named_modules` name; a weight that two modules share is scored once. One
            with weights of half precision is scored as a float32 copy.
        batches (`Iterable[tuple[Tensor, Tensor]]`):
            Calibration sets, each `(images [N, 3, H, W] in [0, 1], labels [N])`; scores are means over the sets.
        attack ([`AttackConfig`]):
            Makes the adversarial images; `eps=0` gives the sensitivity of the clean loss. Its dtype is that of the
            passes for the scores too; sums over images and weights stay in their own.
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
        distributed (`bool`, *optional*, defaults to `False`):
            Whether every process of the group makes this same call: each then takes a share of every set, and all get
            the same scores.
        journal (`Path` or `str`, *optional*):
            File to keep each score in as soon as it is measured. The same call on the same network and images goes on
            from there, and ends with the same result.

    Returns:
        [`SensitivityResult`].

    Raises:
        ValueError: If an option is unknown or out of range, images are no pixels in [0, 1], labels do not fit them, a
            weight is not finite, there is nothing to score, or the loss stops being finite.
    """
    steps = _check_options(method, gamma, num_steps, batch_size)
    check_attack(attack)
    check_finite_weights(model)
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
        model = copy.deepcopy(model).float()  # a score is a small difference of losses, and a step one of weights
    slices = attention_slices(model) if slices is None else slices
    targets = _targets(model, groups, slices)
    every_piece = [piece for pieces in targets.values() for piece in pieces]
    sets = calibration_sets(batches)
    processes = Processes.of(distributed)
    settings = {
        "method": method,
        "gamma": float(gamma),
        "num_steps": steps,
        "seed": seed,
        "attack": asdict(attack) | {"step_size": attack.step},
        "images_per_set": [len(images) for images, _ in sets],
        "batch_size": batch_size,
        "groups": {name: list(members) for name, members in (groups or {}).items()},
        "slices": {
            name: [module, *rows.indices(len(cast(Tensor, model.get_submodule(module).weight)))]
            for name, (module, rows) in (slices or {}).items()
        },
        "dtype": str(every_piece[0].weight.dtype).removeprefix("torch."),
    }
    per_set, robust_losses, first = [], [], 0
    # The attack of each set, and the loss and gradient that its scores start from.
    forwards = backwards = len(sets) * (1 + (attack.num_steps if attack.eps > 0 else 0))
    subject = _subject(settings, model, sets) if journal else {}
    bar = progress_bar(len(sets) * len(targets), "sensitivity", "module", shown=progress and processes.is_main)
    with eval_mode(model), frozen(model), Journal(journal, subject, processes) as kept, bar:
        for number, (images, labels) in enumerate(sets):
            known = {entry["name"]: entry for entry in kept.entries if entry["set"] == number}
            bar.update(len(known))
            missing = targets.keys() - known.keys()
            if missing:
                parts = attacked_batches(
                    model,
                    [(images, labels)],
                    attack,
                    seed=seed,
                    first=first,
                    batch_size=batch_size,
                    processes=processes,
                )
                measure = RobustLoss(model, list(parts), len(images), attack, processes)
                for entry in _scores(targets, missing, measure, gamma, steps):
                    known[entry["name"]] = entry | {"set": number}
                    kept.add(known[entry["name"]])
                    bar.update()
            first += len(images)
            forwards += sum(entry["forwards"] for entry in known.values())
            backwards += sum(entry["backwards"] for entry in known.values())
            per_set.append({name: known[name]["score"] for name in targets})
            robust_losses.append(next(iter(known.values()))["robust_loss"])
    settings |= {"robust_losses": robust_losses, "forwards": forwards, "backwards": backwards}
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
        return {unit.name: float(scores[unit.name]) for unit in units}
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
    return {unit.name: float(COMBINERS[combine]([scores[member] for member in unit.members])) for unit in units}


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
) -> dict[str, list[Piece]]:
    """What is perturbed together, by name: each weight, each named slice of one; or groups of these."""
    members: dict[str, Piece] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, SCORED_MODULES):
            continue
        if not isinstance(module.weight, nn.Parameter):
            raise ValueError(f"the weight of module {name!r} is computed (parametrized); make it plain before scoring.")
        if id(module.weight) not in seen:
            seen.add(id(module.weight))
            members[name] = Piece(module.weight)
    of_module: dict[str, list[str]] = {name: [name] for name in members}
    for name, (module_name, rows) in (slices or {}).items():
        if module_name not in of_module:
            raise ValueError(
                f"slice {name!r} is of {module_name!r}, which is not scored; scored: {', '.join(of_module)}."
            )
        if name in members:
            raise ValueError(f"slice {name!r} has the name of a module, whose score it would take; give it another.")
        length = len(members[module_name].weight)
        if not isinstance(rows, slice) or not range(length)[rows]:
            raise ValueError(
                f"slice {name!r} is {rows!r} of the {length} rows of {module_name!r}; a slice that holds some of them "
                "is needed, such as slice(0, 8)."
            )
        members[name] = Piece(members[module_name].weight, rows)
        of_module.setdefault(module_name, []).append(name)
    if not members:
        known = ", ".join(kind.__name__ for kind in SCORED_MODULES)
        raise ValueError(f"{type(model).__name__} has no module to score; a {known} is needed.")
    if groups is None:
        # A slice comes after the module that it is of.
        return {name: [members[name]] for names in of_module.values() for name in names}
    if not groups:
        raise ValueError("groups is empty; give at least one group of modules, or None to score each module by itself.")
    for group, names in groups.items():
        if isinstance(names, str):
            raise ValueError(f"group {group!r} is {names!r}; a list of members is needed, such as [{names!r}].")
        unknown = [name for name in names if name not in members]
        if unknown or not names:
            wrong = f"the unknown member {unknown[0]!r}" if unknown else "no members"
            raise ValueError(f"group {group!r} has {wrong}; known members: {', '.join(members)}.")
        pieces = [members[name] for name in names]
        perturbed = [(id(weight), row) for weight, rows in pieces for row in range(len(weight))[rows]]
        if len(perturbed) != len(set(perturbed)):
            raise ValueError(f"members of group {group!r} overlap; name each weight, or slices of it, once.")
    return {group: [members[name] for name in names] for group, names in groups.items()}


def _scores(
    targets: Mapping[str, list[Piece]], missing: Container[str], measure: RobustLoss, gamma: float, steps: int
) -> Iterator[dict[str, Any]]:
    """The score of each missing target on one set, with what it cost; no steps mean first order."""
    every_piece = [piece for pieces in targets.values() for piece in pieces]
    with ReadingOrder(piece.weight for piece in every_piece) as order:
        loss, gradients = measure(every_piece)
    remaining = iter(gradients)
    first = {name: list(islice(remaining, len(pieces))) for name, pieces in targets.items()}
    # What is kept of the network before one target's weights serves the next. A process without images saw no order.
    places = {name: min(order.place(piece.weight) for piece in pieces) for name, pieces in targets.items()}
    for name in measure.processes.from_main(sorted(targets, key=places.__getitem__)):
        pieces, gradient = targets[name], first.pop(name)
        if name not in missing:
            continue
        forwards, backwards = measure.forwards, measure.backwards
        radius = gamma * norm(piece.view for piece in pieces)
        score = radius * norm(gradient)  # 0 where the loss does not depend on them
        if steps and score:
            with measure.changing_only(pieces):
                # Folded, the network rounds in another way: in half precision by as much as a small score.
                start, _ = measure() if measure.in_half else (loss, ())
                score = ascend(pieces, gradient, radius, steps, measure, start)
        yield {
            "name": name,
            "score": score,
            "robust_loss": loss,
            "forwards": measure.forwards - forwards,
            "backwards": measure.backwards - backwards,
        }


def _subject(settings: Mapping[str, Any], model: nn.Module, sets: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Everything that a score depends on: settings, network, images."""
    images, first = [images_sha256(*pair) for pair in sets], placed(sets[0][0], model)
    network = {"weights": weights_sha256(model), "answers": answers_of(model, first)}
    return {"sensitivity": dict(settings), "images": images} | network


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
