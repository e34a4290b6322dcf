"""SHA-256 of weights, of networks and of images: what a measurement was made on."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_WITHOUT_EFFECT = {"training", "inplace", "momentum", "gradient_checkpointing", "grad_checkpointing", "name_or_path"}


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's state dict, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor).data)
    return digest.hexdigest()


def network_sha256(model: nn.Module) -> str:
    """
    SHA-256 of the weights and of what else a forward may read: the classes of the modules, every buffer, and their
    attributes that are numbers, strings or tensors, such as a mean that images are normalised by. Modes, rates of
    dropout, checkpointing of gradients and where a model was loaded from leave no mark.
    """
    digest = hashlib.sha256(weights_sha256(model).encode())
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__module__}.{type(module).__qualname__}".encode())
        attributes = vars(module) | module._buffers
        for key in sorted(attributes):
            if key not in _WITHOUT_EFFECT and not key.startswith("_") and "drop" not in key:
                value = attributes[key]
                if isinstance(value, Tensor):
                    digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
                    digest.update(_bytes(value).data)
                elif _is_plain(value):
                    digest.update(f"{key} {value!r}".encode())
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(item, bool | int | float) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def images_sha256(images: Tensor, labels: Tensor) -> list[str]:
    """For each image `[N, 3, H, W]` and label `[N]` the first half of a SHA-256 over shape, pixels and label."""
    return [
        hashlib.sha256(f"{label} {tuple(image.shape)}".encode() + _bytes(image).tobytes()).hexdigest()[:32]
        for image, label in zip(images, labels.tolist(), strict=True)
    ]


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
