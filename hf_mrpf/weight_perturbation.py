"""Adversarial weight perturbation (AWP): a training step taken where the weights near by are worst."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .processes import Processes


@contextmanager
def adversarial_weights(
    model: nn.Module, loss: Callable[[], Tensor], gamma: float, processes: Processes | None = None
) -> Iterator[None]:
    """
    Meanwhile every weight w of two dimensions or more stands at `w + gamma * ||w|| * g / ||g||`, g the loss's gradient.

    This is one step of radius gamma from the weights, layer by layer ([Wu et
    al.](https://huggingface.co/papers/2004.05884)); biases and norms stay. Gradients taken within are those
    that the optimizer steps along, from the weights as they were; these are back afterwards, bit for bit. What
    evaluating the loss does to buffers, such as BatchNorm's statistics, is undone, also where it fails.

    Args:
        model (`nn.Module`):
            Not wrapped for data parallelism: no gradient of its parameters is kept.
        loss (`Callable[[], Tensor]`):
            Evaluates the loss, `[]`, with its graph, on adversarial images.
        gamma (`float`):
            Radius, relative to the l2 norm of each weight.
        processes ([`Processes`], *optional*):
            Who adds up the gradient, each of its own images, so that all perturb alike; this process alone by default.

    Raises:
        ValueError: If every such weight is frozen; nothing is evaluated then.
    """
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if name.split(".")[-1] == "weight" and parameter.ndim > 1 and parameter.requires_grad
    ]
    if not weights:
        raise ValueError(
            "every weight of two dimensions or more is frozen, and adversarial weight perturbation moves no other: "
            "leave awp_gamma out, or let one be trained (requires_grad_())."
        )
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    finally:
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
    directions = [
        torch.zeros_like(weight) if gradient is None else gradient
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    (processes or Processes()).sum_(directions)
    originals = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, direction in zip(weights, directions, strict=True):
            # The floor leaves a weight without gradient where it is.
            weight.add_(direction * (gamma * weight.norm() / direction.norm().clamp_min(1e-20)))
    torch.clear_autocast_cache()  # it holds the weights as they were, in the smaller type
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
