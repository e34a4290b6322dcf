"""What must hold for robust accuracies to be believed, and what fails: after Carlini et al., arXiv 1902.06705."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .attacks import AttackConfig, keyed_start, logits_of, pgd_attack
from .evaluation import evaluate_robustness
from .indexed_images import indexed_batches
from .modes import eval_mode, in_own_dtype
from .report import RobustnessReport

NOISE = 0.02  # of an accuracy, between attacks whose order is known
LEAST_KNOWN = 0.1  # of the way from guessing to no error, where classes are few
MOST_ZERO_GRADIENTS = 0.05
MOST_BESIDE_AUTOATTACK = 0.05
LARGE_EPS = 0.5  # linf: every image can be made grey
MOST_AT_LARGE_EPS = 0.05
IMAGES = 64  # that the checks with attacks of their own look at
# From weak to strong, each with more steps than the one before it.
BY_STEPS = ("fgsm", "pgd20", "pgd50x5")
# A single step is no measure for 5,000 queries.
WHITE_BOX = ("pgd20", "pgd50x5", "cw", "apgd_ce", "apgd_t", "fab_t")


def failures_of_report(report: RobustnessReport, classes: int) -> list[str]:
    """
    The checks that need nothing but the report of a model with so many classes.

    Clean accuracy is above guessing; the share of images without gradient is near 0; more steps raise no accuracy
    beyond noise; PGD-20 is within 5 points of AutoAttack; the black-box attack is no stronger than the best with
    gradients and several steps.

    Returns:
        `list[str]`: one line for each check that fails; a check whose attacks the report lacks is left out.
    """
    found, at = [], report.attacks
    guessing = 1 / classes
    if report.clean_accuracy < min(2 * guessing, guessing + LEAST_KNOWN * (1 - guessing)):
        found.append(f"clean accuracy is near the {guessing:.1%} of guessing; is this the right data set?")
    share = report.zero_gradient_share
    if share is not None and share > MOST_ZERO_GRADIENTS:
        found.append(
            f"gradients are masked: {share:.1%} of the images have none at any pixel, so that gradient attacks "
            "cannot move them; the robust accuracies are not to be trusted."
        )
    known = [name for name in BY_STEPS if name in at]
    for weak, strong in pairwise(known):
        if at[strong] > at[weak] + NOISE:
            found.append(
                f"more steps fool fewer images: {at[strong]:.1%} withstand {strong} and {at[weak]:.1%} {weak}, as "
                "under masked gradients."
            )
    if {"pgd20", "autoattack"} <= at.keys() and at["pgd20"] - at["autoattack"] > MOST_BESIDE_AUTOATTACK:
        found.append(
            f"PGD-20 overstates robustness: {at['pgd20']:.1%} withstand it and {at['autoattack']:.1%} AutoAttack: "
            "quote the latter."
        )
    white = [at[name] for name in WHITE_BOX if name in at]
    if "square" in at and white and at["square"] < min(white) - NOISE:
        found.append(
            f"the black-box attack is the strongest: {at['square']:.1%} withstand square and {min(white):.1%} the best "
            "attack with gradients, as under masked gradients."
        )
    return found


def failures_under_attack(
    model: nn.Module,
    data: Any,
    attack: AttackConfig,
    *,
    parent: nn.Module | None = None,
    num_samples: int = IMAGES,
    seed: int = 0,
) -> list[str]:
    """
    The checks that need attacks of their own, on a stratified subset of at most `num_samples` images.

    Nothing withstood at eps 0 but what is classified correctly; robust accuracy near 0 at an linf eps of 0.5; and, with
    `parent`, images made on the dense parent fool the model no more often than those made on the model itself. Cost:
    PGD-20 on those images twice, three more times with `parent`.

    Args:
        model (`nn.Module`), data, attack, seed:
            As of `evaluate_robustness`.
        parent (`nn.Module`, *optional*):
            The network that the model was pruned from, on the same device.
        num_samples (`int`, *optional*, defaults to `64`):
            Images to look at.

    Returns:
        `list[str]`: one line for each check that fails.
    """
    images, labels, indices = _some(model, data, num_samples, seed)
    chosen = (images, labels)
    found = []
    still = evaluate_robustness(model, chosen, ("pgd20",), replace(attack, eps=0.0, step_size=None), seed=seed)
    if still.attacks["pgd20"] != still.clean_accuracy:
        found.append(
            f"an attack at eps 0 changes accuracy from {still.clean_accuracy:.1%} to {still.attacks['pgd20']:.1%}; is "
            "the model random, or does it remember what it has seen?"
        )
    large = evaluate_robustness(model, chosen, ("pgd20",), AttackConfig("linf", LARGE_EPS), seed=seed)
    if large.attacks["pgd20"] > MOST_AT_LARGE_EPS:
        found.append(
            f"{large.attacks['pgd20']:.1%} of {len(images)} images withstand PGD-20 at a linf eps of 0.5, at which "
            "every image can be made grey: the attack does not work on this model."
        )
    if parent is not None:
        own = evaluate_robustness(model, chosen, ("pgd20",), attack, seed=seed).attacks["pgd20"]
        transferred = transfer_accuracy(model, parent, images, labels, attack, indices=indices, seed=seed)
        if transferred < own - NOISE:
            found.append(
                f"transfer is stronger than attack: {transferred:.1%} of {len(images)} images withstand PGD-20 made on "
                f"the parent and {own:.1%} PGD-20 made on the model, as under masked gradients."
            )
    return found


def transfer_accuracy(
    model: nn.Module,
    parent: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: AttackConfig,
    *,
    indices: list[int],
    seed: int = 0,
) -> float:
    """Share of the images that `model` classifies correctly as they are and after PGD-20 on `parent`."""
    device = next(parent.parameters()).device
    images, labels = images.to(device), labels.to(device)
    attack = replace(attack, num_steps=20, dtype="float32")
    start = keyed_start(images, indices, attack, seed)
    with in_own_dtype(parent):
        adversarial = pgd_attack(parent, images, labels, attack, start=start)
    with in_own_dtype(model), eval_mode(model), torch.no_grad():
        right = [logits_of(model(pixels)).argmax(1) == labels for pixels in (images, adversarial)]
    return (right[0] & right[1]).float().mean().item()


def _some(model: nn.Module, data: Any, count: int, seed: int) -> tuple[Tensor, Tensor, list[int]]:
    size = getattr(getattr(model, "config", None), "image_size", None)
    batches = indexed_batches(data, count, seed, count, size if isinstance(size, int) else None)
    indices, images, labels = next(batches)
    return images, labels, indices
