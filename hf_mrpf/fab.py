"""FAB: the closest point beyond a linearised decision boundary, step by step, close to the image (arXiv 1907.02044)."""

import torch
from torch import Tensor, nn

from .attacks import AttackConfig, check_labels, check_pixels, gradient_of, logits_of, surely_wrong, under_attack
from .folding import fast_layout

OVERSHOOT = 1.05  # eta of the paper: how far beyond the linearised boundary a step goes
MOST_BIAS = 0.1  # alpha_max: the largest weight of the step that begins at the image
BACKWARD = 0.9  # beta: what is left of the way from the image once a point is classified wrongly


def fab_attack(model: nn.Module, images: Tensor, labels: Tensor, attack: AttackConfig, *, targets: Tensor) -> Tensor:
    """
    Targeted Fast Adaptive Boundary attack of [Croce and Hein](https://huggingface.co/papers/1907.02044).

    Each step projects the iterate, and the image, onto the boundary between label and target as it is linearised at the
    iterate, within [0, 1], and goes to a weighted mean of the two. An iterate that is classified wrongly is moved back
    towards the image. As what counts here is whether a wrongly classified point lies within `eps`, an image leaves the
    batch once there is one, and the final search of the paper for a still closer one is left out, as in AutoAttack. No
    random numbers: without restarts FAB begins at the image. The model is guarded as in `pgd_attack`, and an image's
    result does not depend on the others.

    Args:
        model (`nn.Module`):
            Takes pixels in [0, 1] and returns logits, or an output with `.logits`.
        images (`Tensor` of shape `[N, 3, H, W]`):
            Float pixels in [0, 1].
        labels (`Tensor`):
            Class indices `[N]`.
        attack ([`AttackConfig`]):
            Norm, radius and number of steps; `step_size` and `random_start` are not read.
        targets (`Tensor`):
            Class indices `[N]`, the class on the other side of the boundary of each image.

    Returns:
        `Tensor` of the shape of `images`: a point within `eps` that fooled the model, else the image itself.

    Raises:
        ValueError: If the images are no pixels in [0, 1], or labels or targets do not fit them.
    """
    check_pixels(images)
    check_labels(labels, len(images))
    check_labels(targets, len(images))
    images, labels, targets = images.detach(), labels.detach(), targets.detach()
    found = images.clone()
    if attack.eps == 0 or not len(images):
        return found
    with under_attack(model, images), torch.no_grad():
        layout = fast_layout(model, images)
        # Flat rows for the projections; the model gets them back in the layout that it is fastest in.
        shape, origins, place = images.shape[1:], images.flatten(1), torch.arange(len(images), device=images.device)
        points = origins.clone()
        for _ in range(attack.num_steps):
            with torch.enable_grad():
                leaf = points.view(-1, *shape).contiguous(memory_format=layout).requires_grad_()
                logits = logits_of(model(leaf))
                gap = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
                gradient = gradient_of(gap.sum(), leaf)
            points = _next(points, origins, gap.detach(), gradient.flatten(1), attack.norm)
            logits = logits_of(model(points.view(-1, *shape).contiguous(memory_format=layout)))
            wrong = logits.argmax(1) != labels
            near = wrong & (LENGTHS[attack.norm](points - origins) <= attack.eps)
            if near.any():
                found[place[near]] = points[near].view(-1, *shape)
                # FAB lands close to the boundary: what is wrong by rounding alone is kept, but goes on.
                left = ~(near & surely_wrong(logits, labels))
                points, origins, labels, targets, place, wrong = (
                    rows[left] for rows in (points, origins, labels, targets, place, wrong)
                )
                if not len(place):
                    break
            points = torch.where(wrong[:, None], origins + BACKWARD * (points - origins), points)
    return found


def _next(points: Tensor, origins: Tensor, gap: Tensor, normal: Tensor, norm: str) -> Tensor:
    """One step of FAB from points `[N, D]`, where the logits differ by `gap` and that has the gradient `normal`."""
    step = to_hyperplane(points, normal, gap, norm)
    from_origin = to_hyperplane(origins, normal, gap + (normal * (origins - points)).sum(1), norm)
    length, other = LENGTHS[norm](step), LENGTHS[norm](from_origin)
    bias = (length / (length + other).clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(MOST_BIAS)[:, None]
    return ((1 - bias) * (points + OVERSHOOT * step) + bias * (origins + OVERSHOOT * from_origin)).clamp_(0, 1)


def to_hyperplane(points: Tensor, normal: Tensor, value: Tensor, norm: str) -> Tensor:
    """
    Shortest step, in the norm, from points in [0, 1] to where `value + normal . step` is 0, without leaving [0, 1].

    Along the way every coordinate moves in proportion to the gradient (l2), or as far as any other (linf), until it
    meets its bound, so that what is gained is `sum(weight * min(t, bound))` in the length t of the way.

    Args:
        points, normal (`Tensor` of shape `[N, D]`):
            Points in [0, 1], and the gradient of the linear function at each.
        value (`Tensor` of shape `[N]`):
            The linear function at the points.
        norm (`str`):
            `"linf"` or `"l2"`.

    Returns:
        `Tensor` of shape `[N, D]`: the step; where the box does not reach the hyperplane, the one to the corner of the
        box that is closest to it.
    """
    toward = -value.sign()[:, None] * normal
    room = torch.where(toward > 0, 1 - points, points)
    size = normal.abs()
    bound = room if norm == "linf" else room / size
    bound = torch.where(size > 0, bound, 0)
    reach = torch.minimum(_way(size if norm == "linf" else size.square(), bound, value.abs())[:, None], bound)
    return reach * (toward.sign() if norm == "linf" else toward)


def _way(weight: Tensor, bound: Tensor, goal: Tensor) -> Tensor:
    """The t `[N]` at which `sum(weight * min(t, bound))` over `[N, D]` is the goal, at most the largest bound."""
    bound, order = bound.sort(1)
    weight = weight.gather(1, order)
    met = (weight * bound).cumsum(1)  # gained by the coordinates that have met their bounds
    free = weight.flip(1).cumsum(1).flip(1)  # weight of this coordinate and of those after it
    gained = met + bound * (free - weight)
    first = (gained < goal[:, None]).sum(1, keepdim=True).clamp_max(bound.shape[1] - 1)
    before = torch.where(first > 0, met.gather(1, (first - 1).clamp_min(0)), 0)
    way = (goal[:, None] - before) / free.gather(1, first).clamp_min(torch.finfo(goal.dtype).tiny)
    return torch.minimum(way, bound[:, -1:]).squeeze(1)


LENGTHS = {"linf": lambda rows: rows.abs().amax(1), "l2": lambda rows: rows.norm(dim=1)}
