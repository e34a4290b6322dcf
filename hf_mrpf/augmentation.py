"""What training does to a batch of images at random: crops, and mirroring where a mirrored image keeps its class."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

DIGITS = {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"}


def mirror_keeps_class(class_names: Sequence[str] | None) -> bool:
    """
    Whether images may be mirrored in training, by what their classes are called: not where they are the ten digits,
    `"0"` to `"9"`. Nothing is known of classes without names, and they are mirrored.
    """
    return class_names is None or set(class_names) != DIGITS


def crop_padding_of(height: int) -> int:
    """Zeros that the random crop adds on each side by default: an eighth of the height (4 at 32x32)."""
    return height // 8


def augment(images: Tensor, *, padding: int | None = None, flip: bool = True) -> Tensor:
    """
    Crops every image of a batch at random out of its zero-padded self, and mirrors it with probability 1/2.

    Draws from the global generator of the images' device: first the vertical and horizontal offsets, then the coins.

    Args:
        images (`torch.Tensor`):
            Batch `[N, C, H, W]`.
        padding (`int`, *optional*):
            Zeros added on each side. An eighth of the height by default (4 at 32x32); 0 leaves the crop out.
        flip (`bool`, *optional*, defaults to `True`):
            Whether to mirror, left and right. Not for classes that a mirror changes, such as digits.

    Returns:
        `torch.Tensor`: a batch of the same shape.
    """
    count, _, height, width = images.shape
    padding = crop_padding_of(height) if padding is None else padding
    if padding:
        down, right = torch.randint(2 * padding + 1, (2, count), device=images.device)
        windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(count, device=images.device), :, down, right]
    if flip:
        coins = torch.rand(count, device=images.device) < 0.5
        images = torch.where(coins.view(-1, 1, 1, 1), images.flip(3), images)
    return images
