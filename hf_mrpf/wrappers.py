"""What hides the layers of a network from pruning: wrappers of modules, and weights that are computed from others."""

from torch import nn
from torch.nn.utils import parametrize

from .architectures import class_id, full_name

# Where a class of hooks that make a weight before each pass is defined -> what makes it a plain parameter again.
_REMOVERS = {
    "torch.nn.utils.spectral_norm": "torch.nn.utils.remove_spectral_norm({})",
    "torch.nn.utils.weight_norm": "torch.nn.utils.remove_weight_norm({})",
    "torch.nn.utils.prune": "torch.nn.utils.prune.remove({}, name)",
}


def refuse_hidden(model: nn.Module) -> None:
    """
    Refuse (ValueError) a model of which a wrapper hides the names of layers, or a re-parametrisation their weights.

    The message names the first such module and says what takes it off. A network that `model.compile()` compiled in
    place is not wrapped.
    """
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        path = f"model.{name}" if name else "model"
        if class_id(module) == ("torch._dynamo.eval_frame", "OptimizedModule"):
            raise ValueError(
                f"cannot prune this model: {where} was made by torch.compile(...), under which layers have other "
                f"names. Give the network itself, {path}._orig_mod, and compile it after pruning."
            )
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"cannot prune this model: {where} is a {type(module).__name__}, under which layers have other names. "
                f"Give the network itself, {path}.module, and wrap it after pruning."
            )
        if (removal := _removal(module, path)) is not None:
            raise ValueError(
                f"cannot prune this model: {where} ({full_name(module)}) computes a weight from other tensors before "
                f"each pass, which pruning cannot cut. Make it a plain parameter first: {removal}."
            )


def _removal(module: nn.Module, path: str) -> str | None:
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))  # type: ignore[arg-type]
        return f"torch.nn.utils.parametrize.remove_parametrizations({path}, {name!r})"
    makers = [type(hook).__module__ for hook in module._forward_pre_hooks.values()]
    return next((_REMOVERS[maker].format(path) for maker in makers if maker in _REMOVERS), None)
