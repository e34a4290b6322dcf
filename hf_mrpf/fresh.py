"""The control of a pruned model: the same shape from fresh weights, for as long as the whole way to it took."""

import copy
from typing import Any

import torch

from .efficiency import count_macs
from .modeling import PrunedConfig, PrunedForImageClassification


def with_fresh_weights(model: PrunedForImageClassification) -> PrunedForImageClassification:
    """
    A model of the same shape with random weights, from the global generator, on the same device.

    They are those of the dense network cut to this shape, so their scale is the one its initialisation gave the dense.
    """
    fresh: Any = PrunedForImageClassification(copy.deepcopy(model.config))
    return fresh.to(model.device)


def equal_compute_epochs(model: PrunedForImageClassification, dense_epochs: float, epochs: float) -> float:
    """
    How long `model` can be trained for the multiply-accumulates of the whole way to it.

    Args:
        model ([`PrunedForImageClassification`]):
            The pruned shape; its config says which dense network it came from.
        dense_epochs (`float`), epochs (`float`):
            Epochs of the dense network before it was pruned, and of this shape after that. The same images and attack
            steps in both, which a sweep checks; what pruning itself took and a teacher's predictions are not counted.

    Returns:
        `float`: `dense_epochs * MACs(dense) / MACs(model) + epochs`.
    """
    if not dense_epochs:
        return epochs
    values = model.config.to_dict() | {"pruning": None}
    dense: Any = PrunedForImageClassification(PrunedConfig.from_dict(values))
    example = torch.zeros(1, 3, model.config.image_size, model.config.image_size, device=model.device)
    return dense_epochs * count_macs(dense.to(model.device), example) / count_macs(model, example) + epochs
