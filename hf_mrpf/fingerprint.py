"""What a measurement was made on: SHA-256 of weights and of images, and what a network answers."""

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from .attacks import logits_of
from .modes import eval_mode, in_own_dtype


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's state dict, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor).data)
    return digest.hexdigest()


def answers_of(model: nn.Module, images: Tensor) -> list[str]:
    """
    Logits of the first of the images, to three digits: beside the weights they tell whether a network is the same. It
    may read what no state dict holds, such as the mean that it normalises by.
    """
    devices = [images.device] if images.device.type == "cuda" else []
    with eval_mode(model), in_own_dtype(model), torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return [f"{logit:.3g}" for logit in logits_of(model(images[:1]))[0].tolist()]


def images_sha256(images: Tensor, labels: Tensor) -> list[str]:
    """For each image `[N, 3, H, W]` and label `[N]` the first half of a SHA-256 over shape, pixels and label."""
    return [
        hashlib.sha256(f"{label} {tuple(image.shape)}".encode() + _bytes(image).tobytes()).hexdigest()[:32]
        for image, label in zip(images, labels.tolist(), strict=True)
    ]


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
