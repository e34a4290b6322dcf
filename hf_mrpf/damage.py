"""Widths by measured damage: what pruning, repaired and attacked anew, costs in robust loss at the margin."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .allocation import Widths, meet_target, nearest_width, nudged
from .attacks import AttackConfig, logits_of
from .calibration import attacked_batches
from .modes import eval_mode
from .pruned_copies import PrunedCopies, Sets
from .weight_scores import precise

ROUNDS = 3
ATTACK_STEPS = 3
# Half of the span of a central difference, and the most that a round changes: parts of a width, in logarithms.
STEP = math.log(1.25)
_HALVINGS = 60


def damage(
    model: nn.Module,
    copies: PrunedCopies,
    batches: Sets,
    attack: AttackConfig,
    options: Mapping[str, Sequence[int]],
    target: float,
    seed: int,
) -> Widths:
    """
    Move widths from where they matter little to where they matter much, starting from the same share of every unit.

    With J(w) the [`calibrated_losses`] of a copy that is pruned to widths w, repaired, recalibrated and attacked anew
    by three steps of PGD on the same images with the same noise, a round measures for each unit the central difference
    of J in the logarithm of its width, 25 % to either side of where all units are (removals add up badly, so that each
    is measured beside the others). At the best widths of a size every unit would gain the same by what it costs: slopes
    lie on one line, price times cost. The measured ones are drawn to that line as far as their errors cannot tell them
    from it ([`shrunk`]), and widths move along what remains, the farthest by 25 %, with the price that keeps the size.
    The last calibration set takes no part in that: a round whose J does not fall on it is undone, and is the last. So
    the widths are those of `uniform` where nothing better is found.

    Each of at most three rounds makes two copies a unit and one more. Arguments and result as for a function of
    `MEASURED` (see `measured_allocation.py`); at least two calibration sets are needed.

    Raises:
        ValueError: If there is one calibration set only, or fewer than two images in all but the last.
    """
    if len(batches) < 2:
        raise ValueError(
            "allocation 'damage' measures on some calibration sets and decides on another, and there is one: give two "
            "or more in batches (calibration_sets of a trainer)."
        )
    *measured_on, last = batches
    if sum(len(labels) for _, labels in measured_on) < 2:
        raise ValueError(
            "allocation 'damage' needs the spread over images, and all calibration sets but the last hold fewer than "
            "two: give larger ones in batches (calibration_set_size of a trainer)."
        )
    short = replace(attack, num_steps=ATTACK_STEPS, step_size=None)
    widths = _uniform(copies, options, target)
    current = None
    copies.to_come(ROUNDS * (2 * len(options) + 1) + 1)
    for _ in range(ROUNDS):
        slopes, errors = {}, {}
        for name, choices in options.items():
            below, above = _neighbours(choices, widths[name])
            if below == above:
                continue
            losses = [
                calibrated_losses(copies.at(widths | {name: width}), measured_on, short, seed)
                for width in (below, above)
            ]
            # The same images under the same noise: their spread is that of the difference, not of the losses.
            differences, span = losses[0] - losses[1], math.log(above / below)
            slopes[name] = differences.mean().item() / span
            errors[name] = differences.std().item() / math.sqrt(len(differences)) / span
        if not slopes:  # each unit has one width
            break
        prices = {name: _cost_of_width(copies, widths, name, options[name]) for name in slopes}
        candidate = _moved(copies, options, widths, shrunk(slopes, errors, prices), prices, target)
        if candidate == widths:
            break
        if current is None:
            current = calibrated_losses(copies.at(widths), [last], short, seed).mean()
        found = calibrated_losses(copies.at(candidate), [last], short, seed).mean()
        if found >= current:
            break
        widths, current = candidate, found
    return widths


def calibrated_losses(model: nn.Module, batches: Sets, attack: AttackConfig, seed: int) -> Tensor:
    """
    Cross-entropy of each image under an attack on this very model, at the temperature that makes their mean smallest.

    A network whose logits shrink makes smaller mistakes and smaller gradients without being more robust; one
    temperature for all images takes that away.

    Args:
        model (`nn.Module`): takes pixels in [0, 1].
        batches (`list[tuple[Tensor, Tensor]]`): calibration sets `(images [N, 3, H, W] in [0, 1], labels [N])`.
        attack ([`AttackConfig`]): what every image is attacked by, on the cross-entropy.
        seed (`int`): keys the random starts, which are the same for every model.

    Returns:
        `Tensor`: nats, float64, of all images in order.
    """
    logits, labels = [], []
    with eval_mode(model):
        for batch in attacked_batches(model, batches, attack, seed=seed):
            with torch.no_grad():
                logits.append(precise(logits_of(model(batch.adversarial))))
            labels.append(batch.labels.to(logits[-1].device))
    answers, truth = torch.cat(logits), torch.cat(labels)
    return F.cross_entropy(answers * inverse_temperature(answers, truth), truth, reduction="none").cpu()


def inverse_temperature(logits: Tensor, labels: Tensor) -> float:
    """
    The factor of logits `[N, classes]` that makes their mean cross-entropy smallest, in [0.01, 100].

    The loss is convex in the factor: the zero of its derivative, the mean of `sum_c p_c z_c - z_y`, is bisected.
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    low, high = math.log(0.01), math.log(100)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        probabilities = (logits * math.exp(middle)).softmax(1)
        if ((probabilities * logits).sum(1) - own).mean() < 0:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def shrunk(slopes: Mapping[str, float], errors: Mapping[str, float], prices: Mapping[str, float]) -> dict[str, float]:
    """
    What measured slopes say, beyond their noise, about how units differ in gain by cost (empirical Bayes).

    The line `price * cost` is fitted by least squares weighted with the errors. The variance of true slopes around it
    is what that of the measured ones has over the mean of their squared errors, at least 0; each slope keeps the share
    `variance / (variance + error ** 2)` of its distance from the line.

    Args:
        slopes (`Mapping[str, float]`): nats that a unit of logarithm of width gains, by unit.
        errors (`Mapping[str, float]`): their standard errors.
        prices (`Mapping[str, float]`): cost of a unit of logarithm of width, as a fraction of the target.

    Returns:
        `dict[str, float]`: by unit; the line itself where slopes do not spread more than their errors.
    """
    least = 1e-12
    weights = {name: 1 / (errors[name] ** 2 + least) for name in slopes}
    price = sum(weights[name] * slopes[name] * prices[name] for name in slopes) / (
        sum(weights[name] * prices[name] ** 2 for name in slopes) + least
    )
    line = {name: price * prices[name] for name in slopes}
    variance = max(0.0, fmean((slopes[name] - line[name]) ** 2 - errors[name] ** 2 for name in slopes))
    return {
        name: line[name] + variance / (variance + errors[name] ** 2 + least) * (slopes[name] - line[name])
        for name in slopes
    }


def _uniform(copies: PrunedCopies, options: Mapping[str, Sequence[int]], target: float) -> Widths:
    def widths_at(share: float) -> Widths:
        return {name: nearest_width(choices, choices[-1] * share) for name, choices in options.items()}

    return meet_target(copies.size, options, widths_at, dict.fromkeys(options, 0.0), target, lowest=0.0)


def _neighbours(choices: Sequence[int], width: int) -> tuple[int, int]:
    """Allowed widths 25 % below and above, or the next ones where that is none; the width itself at an end."""
    place = choices.index(width)
    below = min(nearest_width(choices, width * math.exp(-STEP)), choices[max(place - 1, 0)])
    above = max(nearest_width(choices, width * math.exp(STEP)), choices[min(place + 1, len(choices) - 1)])
    return below, above


def _cost_of_width(copies: PrunedCopies, widths: Widths, name: str, choices: Sequence[int]) -> float:
    """What a unit of logarithm of width costs here, as a fraction of the present size."""
    below, above = _neighbours(choices, widths[name])
    more = copies.size(widths | {name: above}) - copies.size(widths | {name: below})
    return more / copies.size(widths) / math.log(above / below)


def _moved(
    copies: PrunedCopies,
    options: Mapping[str, Sequence[int]],
    widths: Widths,
    gains: Mapping[str, float],
    prices: Mapping[str, float],
    target: float,
) -> Widths:
    """Widths moved by what each gains beyond its price, the most by `STEP`, at the price that meets the target."""
    if not gains:
        return widths

    def at(price: float, rate: float) -> Widths:
        steps = {name: max(-STEP, min(STEP, rate * (gains[name] - price * prices[name]))) for name in gains}
        return widths | {
            name: nearest_width(options[name], widths[name] * math.exp(step)) for name, step in steps.items()
        }

    # The price at which gains and costs balance tells how far from balance units are; then the size decides it.
    balance = sum(gains.values()) / sum(prices.values())
    farthest = max(abs(gains[name] - balance * prices[name]) for name in gains)
    if farthest <= 1e-9:
        return widths
    rate = STEP / farthest
    low, high = balance - 4 * farthest / min(prices.values()), balance + 4 * farthest / min(prices.values())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if copies.size(at(middle, rate)) > target:
            low = middle
        else:
            high = middle
    return nudged(copies.size, options, at(high, rate), target)
