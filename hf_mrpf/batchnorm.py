"""Running statistics of BatchNorm: measured anew without training, and made one on several processes."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .attacks import check_pixels
from .modes import eval_mode, placed
from .processes import Processes


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> nn.Module:
    """
    Measure the running statistics of every BatchNorm anew, as plain means over batches.

    Only BatchNorm modules run in train mode, so dropout and the like stay off; modes and momenta are given back. Which
    images these are decides what the network normalises by: training images, clean, are the usual choice.

    Args:
        model (`nn.Module`):
            Changed in place: running means and variances alone.
        batches (`Iterable`):
            Float images `[N, 3, H, W]` in [0, 1], or pairs of images and labels; equal sizes make the mean exact. They
            may be of half precision.

    Returns:
        `nn.Module`: `model`.

    Raises:
        ValueError: If there is a BatchNorm with running statistics and `batches` is empty, or one of its batches is no
            images and labels, no pixels in [0, 1], or gives it a single value of a channel. Nothing is changed then,
            nor after any other error of a pass.
    """
    norms = _with_statistics(model)
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    count = 0
    with eval_mode(model), torch.no_grad():
        try:
            for batch in batches:
                if count == 0:
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.momentum = None  # the running statistics become a cumulative mean
                        norm.train()
                images = _checked_images(batch)
                model(placed(images, model))
                count += 1
        except BaseException as error:
            for buffer, value in before:
                buffer.copy_(value)
            if "Expected more than 1 value per channel" in str(error):
                raise ValueError(
                    f"batch {count} of batches has {len(images)} image, which gives a BatchNorm behind pooling or a "
                    "linear layer a single value of each channel, and no variance: give batches of two images or more."
                ) from error
            raise
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if count == 0:
        raise ValueError("batches are empty; BatchNorm statistics need at least one batch of training images.")
    return model


def has_batchnorm(model: nn.Module) -> bool:
    """Whether any module is a BatchNorm, which in training needs more than one value of a channel."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def average_statistics(model: nn.Module, processes: Processes) -> None:
    """
    Replace the running means and variances of every BatchNorm by their means over the processes, in place.

    Each process normalises its own part of a batch in training, so the statistics drift apart; attacks, evaluation and
    saved files use them, and must not depend on the process.

    Args:
        model (`nn.Module`): the same on every process but for these statistics.
        processes ([`Processes`]): who takes part; nothing happens with one process.
    """
    norms = _with_statistics(model)
    if processes.count == 1 or not norms:
        return
    buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
    together = torch.cat(buffers)  # one message in place of one for each buffer
    processes.sum_([together])
    together /= processes.count
    for buffer, mean in zip(buffers, together.split([len(buffer) for buffer in buffers]), strict=True):
        buffer.copy_(mean)


def _checked_images(batch: Any) -> Tensor:
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor):
        raise ValueError(
            f"batches holds a {type(batch).__name__}; each batch must be a tensor of images [N, 3, H, W], or a pair "
            "(images, labels)."
        )
    # Half precision is too coarse for an attack, but it is what a model of half precision takes.
    check_pixels(images.float() if images.is_floating_point() else images)
    return images


def _with_statistics(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
