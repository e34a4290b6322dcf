"""Calibration sets under attack, in micro-batches: what sensitivities, importances and repair are computed on."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

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


def calibration_sets(batches: Iterable[tuple[Tensor, Tensor]] | None) -> list[tuple[Tensor, Tensor]]:
    """
    All sets of `batches`, for where a bad one must be found before anything is computed on the first.

    Raises:
        ValueError: If there is none, or one has no images or is no set by [`check_set`].
    """
    sets = [] if batches is None else list(batches)
    if not sets:
        raise ValueError("batches is empty; at least one calibration set (images, labels) is needed.")
    for entry in sets:
        images, _ = check_set(entry)
        if not len(images):
            raise ValueError("batches holds a set without images; at least one image is needed in each.")
    return sets


def check_set(entry: Any) -> tuple[Tensor, Tensor]:
    """
    The images `[N, 3, H, W]` and labels `[N]` of a calibration set, which may have none.

    Raises:
        ValueError: If it is no pair, the images are no pixels in [0, 1], or the labels no class indices of them.
    """
    if not isinstance(entry, tuple | list) or len(entry) != 2:
        raise ValueError(f"batches holds a {type(entry).__name__}; each entry must be a pair (images, labels).")
    images, labels = entry
    check_pixels(images)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        given = f"{labels.dtype} of shape {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"labels are {given} for images of shape {list(images.shape)}; a tensor of one int64 class index for each "
            "is needed."
        )
    if len(labels) and labels.min() < 0:
        raise ValueError(f"a label is {int(labels.min())}; each must be a class index of at least 0.")
    return images, labels


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
        ValueError: If a set is no pair of pixels in [0, 1] and int64 labels, or these lie outside the model's classes.
    """
    check_attack(attack)
    processes, classes = processes or Processes(), None
    for entry in sets:
        images, labels = check_set(entry)
        if classes is None and len(images):
            classes = number_of_classes(model, images[:1], attack)
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
