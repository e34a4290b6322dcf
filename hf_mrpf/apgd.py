"""APGD: projected gradient ascent with momentum, whose step is halved where it stops paying (arXiv 2003.01690)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import (
    AttackConfig,
    check_labels,
    check_pixels,
    check_start,
    gradient_of,
    lengths,
    logits_of,
    surely_wrong,
    under_attack,
)
from .folding import fast_layout

MOMENTUM = 0.75  # alpha of the paper: weight of the new step
ENOUGH = 0.75  # rho of the paper: share of steps that must raise the loss, else the step is halved
# Below so many classes the denominator of the targeted DLR has no third and fourth logit.
DLR_CLASSES = 4


def apgd_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: AttackConfig,
    *,
    targets: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """
    Auto-PGD of [Croce and Hein](https://huggingface.co/papers/2003.01690), algorithm 1: no step size to choose.

    The step begins at `2 * eps`. At the checkpoints of the paper it is halved, image by image, where fewer than three
    quarters of the steps since the last one raised the loss, or where neither step nor best loss changed; the image
    then goes on from its best point. An image leaves the batch as soon as an iterate is classified wrongly, by more
    than rounding. The model is guarded as in `pgd_attack`, and an image's result does not depend on the others.

    Args:
        model (`nn.Module`):
            Takes pixels in [0, 1] and returns logits, or an output with `.logits`.
        images (`Tensor` of shape `[N, 3, H, W]`):
            Float pixels in [0, 1].
        labels (`Tensor`):
            Class indices `[N]`.
        attack ([`AttackConfig`]):
            Norm, radius and number of steps; `step_size` is not read.
        targets (`Tensor` of class indices `[N]`, *optional*):
            The class that each image is driven to, by the targeted DLR loss (see [`targeted_loss`]). Without, the
            cross-entropy is raised.
        start (`Tensor` of the shape of `images`, *optional*):
            First iterate, within the ball. Defaults to the images.

    Returns:
        `Tensor` of the shape of `images`: the iterate that fooled the model, else the one of highest loss.

    Raises:
        ValueError: If the images are no pixels in [0, 1], or labels, targets or start do not fit them.
    """
    check_pixels(images)
    check_labels(labels, len(images))
    if targets is not None:
        check_labels(targets, len(images))
    check_start(start, images)
    images, labels = images.detach(), labels.detach()
    start = (images if start is None else start).detach()
    if attack.eps == 0 or not len(images):
        return images.clone()

    def slope(points: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss `[N]`, its gradient in the pixels, and which points are classified wrongly."""
        with torch.enable_grad():
            leaf = points.detach().requires_grad_()
            logits = logits_of(model(leaf))
            loss = (
                targeted_loss(logits, labels, targets)
                if targeted
                else F.cross_entropy(logits, labels, reduction="none")
            )
            gradient = gradient_of(loss.sum(), leaf)
        # A copy, as it is kept: a network compiled into CUDA graphs writes its next gradient over this one.
        return loss.detach(), gradient.clone(), surely_wrong(logits.detach(), labels)

    targeted, targets = targets is not None, labels if targets is None else targets.detach()
    with under_attack(model, images), torch.no_grad():
        layout = fast_layout(model, images)
        images = images.contiguous(memory_format=layout)
        found = start.clone(memory_format=layout)
        now = found.clone()
        loss, gradient, fooled = slope(now, labels, targets)
        # One row an image: those that leave take theirs along.
        state = {
            "images": images, "labels": labels, "targets": targets,
            "place": torch.arange(len(images), device=images.device),
            "now": now, "before": now, "loss": loss, "gradient": gradient,
            "best": now, "best_loss": loss, "best_gradient": gradient,
            "step": torch.full_like(loss, 2 * attack.eps), "rises": torch.zeros_like(loss),
            "checked_loss": loss, "was_halved": torch.ones_like(fooled),
        }  # fmt: skip
        checks = checkpoints(attack.num_steps)
        last_check = 0
        for number in range(1, attack.num_steps + 1):
            if fooled.any():
                found.index_copy_(0, state["place"], state["now"])
                state = {name: rows[~fooled] for name, rows in state.items()}
                if not len(state["place"]):
                    break
            _step(state, attack, momentum=number > 1)
            loss, state["gradient"], fooled = slope(state["now"], state["labels"], state["targets"])
            state["rises"] = state["rises"] + (loss > state["loss"])
            state["loss"] = loss
            _keep_best(state)
            if number in checks:
                # A fooled image is left at the iterate that fooled, so it may not jump to another.
                _halve(state, number - last_check, spared=fooled)
                last_check = number
        if len(state["place"]):
            found.index_copy_(0, state["place"], torch.where(_rows(fooled), state["now"], state["best"]))
    return found.contiguous()


def targeted_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """
    Targeted difference of logits ratio of the paper, `[N]`: `(z_t - z_y) / (z_1 - (z_3 + z_4) / 2)`, z_1 the largest.

    It does not change when all logits are scaled, which keeps its gradients from vanishing. With 2 or 3 classes there
    is no fourth logit, and the difference `z_t - z_y` stands for it.
    """
    difference = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
    if logits.shape[1] < DLR_CLASSES:
        return difference
    ordered = logits.topk(DLR_CLASSES, dim=1).values
    return difference / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)


def checkpoints(steps: int) -> list[int]:
    """Numbers of the steps after which the step size is looked at: at 22 % of them, then ever closer, 6 % at least."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    # Rounded first: 0.22 + 0.19 is a little more than 0.41.
    return sorted({math.ceil(round(share * steps, 6)) for share in shares[1:] if share <= 1})


def _step(state: dict[str, Tensor], attack: AttackConfig, *, momentum: bool) -> None:
    """A step along the gradient, mixed with the last one; both are projected."""
    images, now = state["images"], state["now"]
    project = PROJECTIONS[attack.norm]
    ahead = project(now + _rows(state["step"]) * DIRECTIONS[attack.norm](state["gradient"]), images, attack.eps)
    if momentum:
        ahead = now + MOMENTUM * (ahead - now) + (1 - MOMENTUM) * (now - state["before"])
        ahead = project(ahead, images, attack.eps)
    state["before"], state["now"] = now, ahead


def _keep_best(state: dict[str, Tensor]) -> None:
    better = state["loss"] > state["best_loss"]
    state["best_loss"] = torch.where(better, state["loss"], state["best_loss"])
    for best, new in (("best", "now"), ("best_gradient", "gradient")):
        state[best] = torch.where(_rows(better), state[new], state[best])


def _halve(state: dict[str, Tensor], since: int, *, spared: Tensor) -> None:
    """Conditions 1 and 2 of the paper, after `since` steps."""
    wavering = state["rises"] < ENOUGH * since
    stuck = ~state["was_halved"] & (state["best_loss"] <= state["checked_loss"])
    halved = (wavering | stuck) & ~spared
    state["step"] = torch.where(halved, state["step"] / 2, state["step"])
    state["loss"] = torch.where(halved, state["best_loss"], state["loss"])
    for now, best in (("now", "best"), ("gradient", "best_gradient")):
        state[now] = torch.where(_rows(halved), state[best], state[now])
    state["was_halved"], state["checked_loss"] = halved, state["best_loss"]
    state["rises"] = torch.zeros_like(state["rises"])


def _rows(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _into_cube(points: Tensor, images: Tensor, eps: float) -> Tensor:
    return torch.minimum(torch.maximum(points, images - eps), images + eps).clamp_(0, 1)


def _into_ball(points: Tensor, images: Tensor, eps: float) -> Tensor:
    moved = points - images
    return moved.mul_((eps / lengths(moved)).clamp_max(1)).add_(images).clamp_(0, 1)


PROJECTIONS = {"linf": _into_cube, "l2": _into_ball}
DIRECTIONS = {"linf": torch.sign, "l2": lambda gradient: gradient / lengths(gradient)}
