"""Calibration sets under attack, in micro-batches: what sensitivities, importances and repair are computed on."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attacks import AttackConfig, check_attack, check_pixels, computing_in, keyed_start, logits_of, pgd_attack
from .modes import eval_mode, placed, telling_dtypes
from .processes import Processes


class AttackedBatch(NamedTuple):
    """Images `[N, 3, H, W]` in [0, 1], what the attack made of them, and their labels `[N]`; on the model's device."""

    images: Tensor
    adversarial: Tensor
    labels: Tensor


def attacked_batches(
    model: nn.Module,
    sets: Iterable[tuple[Tensor, Tensor]],
    attack: AttackConfig,
    *,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 128,
    processes: Processes | None = None,
) -> Iterator[AttackedBatch]:
    """
    Attack this process's share of every calibration set.

    The random start of an image is keyed by the seed and its position over all sets, so that neither micro-batches nor
    shares change it.

    Args:
        model (`nn.Module`):
            Takes pixels in [0, 1]; attacked in eval mode at its present weights (cross-entropy).
        sets (`Iterable[tuple[Tensor, Tensor]]`):
            `(images [N, 3, H, W] in [0, 1], labels [N])`.
        attack ([`AttackConfig`]): with `eps=0` the images stay as they are.
        seed (`int`), first (`int`): keys of the random starts; `first` is the position of the first image.
        batch_size (`int`, *optional*, defaults to 128): images attacked at once.
        processes ([`Processes`], *optional*): who shares the images; this process alone by default.

    Yields:
        [`AttackedBatch`]; none for a set that is too small to give this process an image.

    Raises:
        ValueError: If images are no pixels in [0, 1], or labels lie outside the model's classes.
    """
    check_attack(attack)
    processes, classes = processes or Processes(), None
    for images, labels in sets:
        if classes is None and len(images):
            classes = number_of_classes(model, images, attack)
        if classes is not None and len(labels) and int(labels.max()) >= classes:
            raise ValueError(f"a label is {int(labels.max())}; the model knows the classes 0 to {classes - 1}.")
        mine = processes.share(len(images))
        position = first + mine.start
        for x, y in zip(images[mine].split(batch_size), labels[mine].split(batch_size), strict=True):
            if not len(x):  # an empty share is split into one empty part
                continue
            x = placed(x, model)
            y = y.to(x.device)
            start = keyed_start(x, range(position, position + len(x)), attack, seed)
            yield AttackedBatch(x, pgd_attack(model, x, y, attack, start=start), y)
            position += len(x)
        first += len(images)


def number_of_classes(model: nn.Module, images: Tensor, attack: AttackConfig | None = None) -> int:
    """
    How many logits the model has, seen in a pass of the first image `[N, 3, H, W]`, in the dtype of the attack.

    A label without a place among them would stop a GPU for good.
    """
    check_pixels(images)
    image = placed(images[:1], model)
    with telling_dtypes(model, image), computing_in(attack or AttackConfig(), image), eval_mode(model), torch.no_grad():
        return logits_of(model(image)).shape[1]
