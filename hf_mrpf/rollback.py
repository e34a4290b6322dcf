"""A model that gets its old tensors and sizes back where changing them ends early."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .modeling import PrunedForImageClassification


@contextmanager
def rolled_back_on_failure(model: nn.Module) -> Iterator[None]:
    """
    Within, channels may be removed and weights changed. After any exception, Ctrl-C too, the model is as before: each
    module with its own parameters and buffers, the very objects, with the same values and the same settings.

    Takes the memory of another copy of the model's weights.
    """
    before = [
        (module, dict(vars(module)), dict(module._parameters), dict(module._buffers)) for module in model.modules()
    ]
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    records = [
        (part.config, part.config.pruning) for part in model.modules() if isinstance(part, PrunedForImageClassification)
    ]
    try:
        yield
    except BaseException:
        for module, own, parameters, buffers in before:
            for added in vars(module).keys() - own.keys():  # such as the autocast that an evaluation wraps it in
                delattr(module, added)
            vars(module).update(own)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):  # one that is expanded could not be written to
                    tensor.copy_(value)
        for config, record in records:
            config.pruning = record
        raise
