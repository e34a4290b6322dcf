"""How a model computes for a while, and is afterwards as it was: modes, gradients of its parameters, precision."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode; afterwards every module has its own mode back, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_own_dtype(model: nn.Module) -> Iterator[None]:
    """
    Let `model` compute in the dtype of its weights, and round as that dtype does: without the autocast that is on or
    that accelerate has put around the forward of a module, and on a GPU without TF32, whose factors have the 10 bits of
    half precision. Afterwards all is as it was, also after an exception. TF32 is a switch of the whole process.
    """
    names = {"forward", "_original_forward"}
    wrapped = {module: vars(module)["forward"] for module in model.modules() if names <= vars(module).keys()}
    device = next(model.parameters(), torch.zeros(())).device
    cuda = [cast(Any, torch.backends.cudnn).conv, torch.backends.cuda.matmul] if device.type == "cuda" else []
    coarse = {backend: backend.fp32_precision for backend in cuda if backend.fp32_precision not in ("ieee", "none")}
    try:
        for module in wrapped:
            vars(module)["forward"] = vars(module)["_original_forward"]
        for backend in coarse:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, forward in wrapped.items():
            vars(module)["forward"] = forward
        for backend, precision in coarse.items():
            backend.fp32_precision = precision


@contextmanager
def telling_dtypes(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Tell, by a ValueError, where a pass fails because images and weights are of different dtypes."""
    try:
        yield
    except RuntimeError as error:
        others = {parameter.dtype for parameter in model.parameters()} - {images.dtype}
        if not others or "type" not in str(error):
            raise
        raise ValueError(
            f"the images are {images.dtype} and weights of the model {' and '.join(map(str, others))}, which it does "
            f"not bring together ({error}): give both in the same dtype, such as model.float() and images.float(). An "
            "AttackConfig(dtype='bfloat16') computes faster."
        ) from error


def placed(images: Tensor, model: nn.Module) -> Tensor:
    """Images on the model's device, and in the precision of its weights where that is single or double."""
    weight = next(model.parameters())
    return images.to(weight.device, weight.dtype if weight.dtype in (torch.float32, torch.float64) else images.dtype)


def frozen(model: nn.Module) -> AbstractContextManager[None]:
    """Stop the gradients of all parameters; afterwards each has its own flag back, also after an exception."""
    return _flagged(model, False)


def trainable(model: nn.Module) -> AbstractContextManager[None]:
    """Let all parameters have gradients; afterwards each has its own flag back, also after an exception."""
    return _flagged(model, True)


@contextmanager
def _flagged(model: nn.Module, flag: bool) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(flag)
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
