"""What a measurement was made on: SHA-256 of weights and of images, and what a network answers."""

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from .attacks import logits_of
from .modes import eval_mode, frozen, in_own_dtype


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's state dict, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor).data)
    return digest.hexdigest()


def answers_of(model: nn.Module, images: Tensor) -> dict[str, list[float]]:
    """
    What a network makes of the first of the images: beside its weights it tells whether it is the same one. It may read
    what no state dict holds, such as the mean that it normalises by.

    Returns:
        `dict`: `logits`, and `gradient`, 16 pixels of that of a weighted sum of them; empty where there is none.
    """
    devices = [images.device] if images.device.type == "cuda" else []
    image = images[:1].detach().clone().requires_grad_()
    with eval_mode(model), in_own_dtype(model), frozen(model), torch.enable_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        logits = logits_of(model(image))
        weighted, gradient = (logits * torch.linspace(-1, 1, logits.shape[1]).to(logits)).sum(), None
        if weighted.requires_grad:
            (gradient,) = torch.autograd.grad(weighted, image, allow_unused=True)
    found = {"logits": logits[0], "gradient": image.new_empty(0) if gradient is None else gradient.flatten()}
    found["gradient"] = found["gradient"][:: max(1, len(found["gradient"]) // 16)]
    # Of those that are not finite the measurement itself will tell.
    return {name: values.tolist() if values.isfinite().all() else [] for name, values in found.items()}


def are_alike(one: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> bool:
    """Whether two answers are of one network, but for rounding, by which a gradient jumps where a ReLU begins."""
    return all(
        len(one.get(name, [])) == len(other.get(name, []))
        and math.dist(one.get(name, []), other.get(name, [])) <= tolerance * math.hypot(*one.get(name, []))
        for name, tolerance in (("logits", 1e-3), ("gradient", 0.05))
    )


def images_sha256(images: Tensor, labels: Tensor) -> list[str]:
    """For each image `[N, 3, H, W]` and label `[N]` the first half of a SHA-256 over shape, pixels and label."""
    return [
        hashlib.sha256(f"{label} {tuple(image.shape)}".encode() + _bytes(image).tobytes()).hexdigest()[:32]
        for image, label in zip(images, labels.tolist(), strict=True)
    ]


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
