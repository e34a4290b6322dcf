"""Square Attack: random search by squares of pixels, which looks at logits, never at gradients (arXiv 1912.00049)."""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from .attacks import (
    AttackConfig,
    check_labels,
    check_pixels,
    keyed_generator,
    lengths,
    logits_of,
    surely_wrong,
    under_attack,
)
from .folding import fast_layout

FIRST_SHARE = 0.8  # of the pixels that the first squares cover, as in AutoAttack
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which that share is halved


def square_attack(
    model: nn.Module, images: Tensor, labels: Tensor, attack: AttackConfig, *, indices: Sequence[int], seed: int = 0
) -> Tensor:
    """
    Square Attack of [Andriushchenko et al.](https://huggingface.co/papers/1912.00049), on the margin of the logits.

    Each query moves a random square of every image and keeps what lowers the margin of the true class. An image leaves
    the batch once it is classified wrongly, by more than rounding. All random numbers of an image come from a generator
    keyed by the seed and its index: neither batch size nor order nor the other images change what is tried on it. The
    share of pixels in a square begins at 0.8 and is halved on the schedule of the paper, which is not stretched to the
    number of queries: so it is in AutoAttack. The model is guarded as in `pgd_attack`.

    Args:
        model (`nn.Module`):
            Takes pixels in [0, 1] and returns logits, or an output with `.logits`.
        images (`Tensor` of shape `[N, 3, H, W]`):
            Float pixels in [0, 1].
        labels (`Tensor`):
            Class indices `[N]`.
        attack ([`AttackConfig`]):
            Norm and radius; `num_steps` is the number of queries, the first image of stripes not counted. `step_size`
            and `random_start` are not read.
        indices (`Sequence[int]`):
            Index of each image in its data set, at least 0.
        seed (`int`, *optional*, defaults to `0`):
            At least 0.

    Returns:
        `Tensor` of the shape of `images`: the point of the lowest margin, which fooled the model where one did.

    Raises:
        ValueError: If the images are no pixels in [0, 1], or labels or indices do not fit them.
    """
    check_pixels(images)
    check_labels(labels, len(images))
    if len(indices) != len(images):
        raise ValueError(f"{len(indices)} indices are given for {len(images)} images; one per image is needed.")
    images, labels = images.detach(), labels.detach()
    if attack.eps == 0 or not len(images):
        return images.clone()
    propose, pixels = PROPOSALS[attack.norm], images.new_empty(0)
    # Few edges among thousands of queries, each of which would wait for a copy to the device.
    bump = cache(lambda edge: _bump(edge).to(pixels))
    with under_attack(model, images), torch.no_grad():
        layout = fast_layout(model, images)
        images = images.contiguous(memory_format=layout)
        found, place = images.clone(), torch.arange(len(images), device=images.device)
        best, draws = STARTS[attack.norm](images, attack, indices, seed)
        logits = logits_of(model(best.contiguous(memory_format=layout)))
        lowest, fooled = _margins(logits, labels), surely_wrong(logits, labels)
        for query in range(attack.num_steps):
            if fooled.any():
                found.index_copy_(0, place, best)
                left = ~fooled
                images, labels, place, best, lowest, draws = (
                    rows[left] for rows in (images, labels, place, best, lowest, draws)
                )
                if not len(place):
                    break
            tried = propose(best, images, attack.eps, draws[:, query], query, bump).contiguous(memory_format=layout)
            logits = logits_of(model(tried))
            margins, fooled = _margins(logits, labels), surely_wrong(logits, labels)
            better = (margins < lowest) | fooled
            lowest = torch.where(better, margins, lowest)
            best = torch.where(better.view(-1, 1, 1, 1), tried, best)
        if len(place):
            found.index_copy_(0, place, best)
    return found.contiguous()


def side(query: int, height: int, width: int) -> int:
    """Side of the squares of a query, in pixels, at least 1 and no longer than the image."""
    share = FIRST_SHARE / 2 ** sum(query > after for after in HALVED_AFTER)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """True logit minus the largest other one, `[N]`."""
    true = logits.gather(1, labels[:, None])
    return (true - logits.scatter(1, labels[:, None], -math.inf).amax(1, keepdim=True)).squeeze(1)


def _start_linf(images: Tensor, attack: AttackConfig, indices: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """Vertical stripes of +-eps, and for every query a place and three signs, all in [0, 1)."""
    _, channels, _, width = images.shape
    stripes, draws = [], []
    for index in indices:
        generator = keyed_generator(seed, int(index))
        stripes.append(torch.rand(channels, 1, width, generator=generator, device="cpu"))
        draws.append(torch.rand(attack.num_steps, 2 + channels, generator=generator, device="cpu"))
    first = images + attack.eps * _signs(torch.stack(stripes).to(images))
    return first.clamp_(0, 1), torch.stack(draws).to(images)


def _propose_linf(
    best: Tensor, images: Tensor, eps: float, draws: Tensor, query: int, bump: Callable[[int], Tensor]
) -> Tensor:
    """A square in which every channel is set to one end of its range."""
    height, width = images.shape[2:]
    inside = _inside(draws[:, :2], side(query, height, width), height, width)
    return torch.where(inside, (images + eps * _signs(draws[:, 2:, None, None])).clamp_(0, 1), best)


def _start_l2(images: Tensor, attack: AttackConfig, indices: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """A grid of bumps of length eps together, and for every query two places, a direction and three signs."""
    _, channels, height, width = images.shape
    tile = min(max(height // 5, 3), height, width)
    rows, columns = height // tile, width // tile
    grids, draws = [], []
    for index in indices:
        generator = keyed_generator(seed, int(index))
        signs = _signs(torch.rand(rows * columns, channels, 1, 1, generator=generator, device="cpu"))
        turned = torch.rand(rows * columns, generator=generator, device="cpu") > 0.5
        grid = torch.zeros(channels, height, width, device="cpu")
        for number in range(rows * columns):
            top, left = number // columns * tile, number % columns * tile
            bump = _bump(tile).T if turned[number] else _bump(tile)
            grid[:, top : top + tile, left : left + tile] = signs[number] * bump
        grids.append(grid)
        draws.append(torch.rand(attack.num_steps, 5 + channels, generator=generator, device="cpu"))
    moved = torch.stack(grids).to(images)
    return (images + attack.eps * moved / lengths(moved)).clamp_(0, 1), torch.stack(draws).to(images)


def _propose_l2(
    best: Tensor, images: Tensor, eps: float, draws: Tensor, query: int, bump: Callable[[int], Tensor]
) -> Tensor:
    """A bump added in one square, which gets what another one and the ball have to spare (algorithm 3 of the paper)."""
    channels, height, width = images.shape[1:]
    edge = max(side(query, height, width), 3) | 1  # odd, so that a bump has a middle
    edge = min(edge, height, width)
    moved = best - images
    filled, emptied = (_inside(draws[:, at : at + 2], edge, height, width) for at in (0, 2))
    top, left = (_corner(draws[:, at], edge, extent) for at, extent in ((0, height), (1, width)))
    row = (torch.arange(height, device=images.device) - top[:, None]).clamp(0, edge - 1)
    column = (torch.arange(width, device=images.device) - left[:, None]).clamp(0, edge - 1)
    upright, turned = (each[row[:, :, None], column[:, None, :]] for each in (bump(edge), bump(edge).T))
    pattern = torch.where(draws[:, 4, None, None] > 0.5, turned, upright)[:, None] * filled
    kept = moved * filled
    fresh = _signs(draws[:, 5:, None, None]) * pattern + kept / _by_channel(kept)
    unused = (eps**2 - moved.square().sum((1, 2, 3), keepdim=True)).clamp_min(0)
    length = ((moved * (filled | emptied)).square().sum((2, 3), keepdim=True) + unused / channels).sqrt()
    moved = torch.where(filled, fresh / _by_channel(fresh) * length, torch.where(emptied, 0, moved))
    return (images + moved * (eps / lengths(moved))).clamp_(0, 1)


def _bump(edge: int) -> Tensor:
    """Two halves of opposite sign, each falling off from its middle, of length 1 together: eta of the paper."""
    if edge == 1:
        return torch.ones(1, 1, device="cpu")
    half = edge // 2
    bump = torch.cat([_pyramid(half, edge), -_pyramid(edge - half, edge)])
    return bump / bump.norm()


def _pyramid(height: int, width: int) -> Tensor:
    """Rings around the middle of a rectangle; the k-th from within adds `1 / k**2` to all that it encloses."""
    rows = (torch.arange(height, device="cpu") - height // 2).abs()
    columns = (torch.arange(width, device="cpu") - width // 2).abs()
    rings = max(height // 2, width // 2) + 1
    ring = torch.maximum(rows[:, None], columns[None, :])
    terms = 1 / torch.arange(1, rings + 1, dtype=torch.float32, device="cpu").square()
    # A pixel in ring r gets the terms of ring r and of all outer ones.
    return terms.flip(0).cumsum(0).flip(0)[ring]


def _inside(place: Tensor, edge: int, height: int, width: int) -> Tensor:
    """Which pixels are in the square at the place `[N, 2]` in [0, 1): `[N, 1, H, W]`."""
    return (_span(place[:, 0], edge, height)[:, :, None] & _span(place[:, 1], edge, width)[:, None, :])[:, None]


def _span(place: Tensor, edge: int, extent: int) -> Tensor:
    offset = torch.arange(extent, device=place.device) - _corner(place, edge, extent)[:, None]
    return (offset >= 0) & (offset < edge)


def _corner(place: Tensor, edge: int, extent: int) -> Tensor:
    # A float32 below 1 times the count may round up to the count itself.
    return (place * (extent - edge + 1)).long().clamp_max(extent - edge)


def _signs(draws: Tensor) -> Tensor:
    return torch.where(draws < 0.5, -1.0, 1.0).to(draws.dtype)


def _by_channel(images: Tensor) -> Tensor:
    """l2 norm of each channel, never 0."""
    tiny = torch.finfo(images.dtype).tiny
    return images.square().sum((2, 3), keepdim=True).sqrt().clamp_min(tiny)


STARTS = {"linf": _start_linf, "l2": _start_l2}
PROPOSALS = {"linf": _propose_linf, "l2": _propose_l2}
