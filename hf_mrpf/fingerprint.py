"""SHA-256 of weights and of images: what a measurement was made on."""

import hashlib

import numpy as np
import torch
from torch import Tensor, nn


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's state dict, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor).data)
    return digest.hexdigest()


def images_sha256(images: Tensor, labels: Tensor) -> list[str]:
    """For each image `[N, 3, H, W]` and label `[N]` the first half of a SHA-256 over shape, pixels and label."""
    return [
        hashlib.sha256(f"{label} {tuple(image.shape)}".encode() + _bytes(image).tobytes()).hexdigest()[:32]
        for image, label in zip(images, labels.tolist(), strict=True)
    ]


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
