"""
The form of a network while an attack runs: BatchNorm folded into convolutions, weights laid out as kernels like them,
convolutions of small maps with fewer multiplications.

An attack passes through a network many times at the same weights, so that what depends on weights alone is done once.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .winograd import LEAST_MAPS, minimal_filtering, suits

LOGGER = logging.getLogger("hf_mrpf")
# Exact classes, by their full names: a subclass may do anything with its weight.
CONVOLUTIONS = (("torch.nn.modules.conv", "Conv2d"), ("timm.layers.conv2d_same", "Conv2dSame"))
NORMS = (("torch.nn.modules.batchnorm", "BatchNorm2d"), ("timm.layers.norm_act", "BatchNormAct2d"))


class Pair(NamedTuple):
    """A convolution, and the BatchNorm that alone reads what it writes."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d


class _Known(NamedTuple):
    modules: list[nn.Module]
    pairs: list[Pair]
    # By the shape of an image: convolutions that fewer multiplications do, and the size of their maps.
    small_maps: dict[torch.Size, dict[nn.Conv2d, torch.Size]]
    takes_channels_last: bool
    flags: dict[tuple[int, str], Any]
    unsteady: set[tuple[int, str]]  # flags that a pass changes


# Weak keys: what is known of a network ends with it. Its root is in no value, or it never would.
_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def fast_layout(model: nn.Module, images: Tensor) -> torch.memory_format:
    """
    The layout that convolutions are fastest in: channels last, but for single precision on a GPU.

    Images stay as they are for a network that can't take the other, as one that calls `view` on what a convolution
    returns: that is seen in the pass that [`folded_batchnorm`] makes as well.
    """
    wanted = images.device.type == "cpu" or torch.is_autocast_enabled(images.device.type)
    return torch.channels_last if wanted and _known(model, images).takes_channels_last else torch.contiguous_format


@contextmanager
def folded_batchnorm(model: nn.Module, images: Tensor) -> Iterator[None]:
    """
    Folds each BatchNorm into the convolution before it, and unfolds it again, also after an exception.

    `gamma * (W x + b - mean) / sqrt(var + eps) + beta` is one convolution. Which modules belong together is seen in a
    pass of one image through a network of any class, once for each size of images until it is changed: each of the two
    runs once, the norm is the one operation that reads what the convolution writes, and nothing else reads the weights
    of the convolution, which may not change meanwhile. These also get the layout of `fast_layout`, and the dtype of an
    autocast that is on. Parameters and buffers are left as they are. A compiled network is left alone.

    Args:
        model (`nn.Module`): in eval mode, without gradients of parameters.
        images (`Tensor` of shape `[N, 3, H, W]`): what will be run through it; the first is looked at.
    """
    known, layout = _known(model, images), fast_layout(model, images)
    small_maps = {} if torch.is_autocast_enabled(images.device.type) else known.small_maps[images.shape[1:]]
    with _folded(known.pairs, small_maps, len(images), {}), _converted(known.modules, images, layout):
        yield


@contextmanager
def folded_except(
    model: nn.Module, images: Tensor, weights: Iterable[Tensor], coarsely: bool, made: dict[nn.Module, Any]
) -> Iterator[None]:
    """
    As [`folded_batchnorm`], but with those weights, which may then be changed, as they are; layouts stay.

    `coarsely` says that passes will be made in half precision. `made` keeps what was made of other weights for the next
    time, when they have to be as they were.
    """
    known, spared = _known(model, images), {id(weight) for weight in weights}
    pairs = [pair for pair in known.pairs if id(pair.convolution.weight) not in spared]
    small_maps = {} if coarsely else known.small_maps[images.shape[1:]]
    small_maps = {one: size for one, size in small_maps.items() if id(one.weight) not in spared}
    with _folded(pairs, small_maps, len(images), made):
        yield


def _known(model: nn.Module, images: Tensor) -> _Known:
    """What a pass of one image shows of a network; of a compiled one there is nothing to be known."""
    modules = list(model.modules())
    if not len(images) or any(map(is_compiled, modules)):
        return _Known([], [], {images.shape[1:]: {}}, True, {}, set())
    known, flags, everything, modules = _KNOWN.get(model), _flags(modules), modules, modules[1:]
    unchanged = known is not None and _is_unchanged(known, modules, flags)
    sizes = known.small_maps if known is not None and unchanged else {}
    if known is not None and images.shape[1:] in sizes:
        return known
    image, takes = images[:1], True
    try:
        pairs, small_maps = _seen(model, modules, image.contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        (pairs, small_maps), takes = _seen(model, modules, image), False
    if known is None:
        # Only what costs time is news to a user.
        norms = sum(_name(module) in NORMS for module in modules)
        level = logging.DEBUG if len(pairs) == norms else logging.INFO
        LOGGER.log(level, "%d of %d BatchNorm layers are folded into convolutions during attacks.", len(pairs), norms)
    after = _flags(everything)
    unsteady = {key for key in flags.keys() | after.keys() if flags.get(key) != after.get(key)}
    unsteady |= known.unsteady if known is not None else set()
    steady = {key: value for key, value in flags.items() if key not in unsteady}
    _KNOWN[model] = _Known(modules, pairs, sizes | {images.shape[1:]: small_maps}, takes, steady, unsteady)
    return _KNOWN[model]


def _is_unchanged(known: _Known, modules: Sequence[nn.Module], flags: dict[tuple[int, str], Any]) -> bool:
    # By identity: a module that was exchanged may have been one of a pair.
    same = list(map(id, known.modules)) == list(map(id, modules))
    return same and {key: value for key, value in flags.items() if key not in known.unsteady} == known.flags


def _flags(modules: Iterable[nn.Module]) -> dict[tuple[int, str], Any]:
    """Switches that may decide what a forward does, of all modules; not their mode."""
    return {
        (number, name): value
        for number, module in enumerate(modules)
        for name, value in vars(module).items()
        if type(value) in (bool, str) and name != "training"  # numbers may be counts of passes
    }


def _seen(model: nn.Module, modules: list[nn.Module], image: Tensor) -> tuple[list[Pair], dict[nn.Conv2d, torch.Size]]:
    """Pairs, and convolutions of small maps with the size of these."""
    # Apart from the work itself, which is then the same bit for bit in a process that knows and in one that does not;
    # by its forward, since what hooks into the model is there to see that work.
    precise, same_noise = torch.autocast(image.device.type, enabled=False), [image.device] if image.is_cuda else []
    with torch.random.fork_rng(same_noise), torch.no_grad(), precise, _watched(modules) as (pairs, small_maps):
        model.forward(image)
    return pairs, small_maps


class _Reads(TorchDispatchMode):
    """Counts the operations that read a tensor, from when it is one of `written`."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, tuple[Any, Tensor]] = {}
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if id(value) in self.written:
                self.count[id(value)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _watched(modules: Sequence[nn.Module]) -> Iterator[tuple[list[Pair], dict[nn.Conv2d, torch.Size]]]:
    """The pairs among the modules and the convolutions of small maps, once a pass has been made."""
    pairs: list[Pair] = []
    small_maps: dict[nn.Conv2d, torch.Size] = {}
    read: list[tuple[Any, Tensor]] = []
    runs: Counter[nn.Module] = Counter()
    reads = _Reads()

    def writes(module: Any, inputs: tuple, output: Tensor) -> None:
        runs[module] += 1
        size = output.shape[-2:]
        if _name(module) == CONVOLUTIONS[0] and not torch.is_autocast_enabled("cpu") and suits(module, size):
            small_maps[module] = size
        reads.written[id(output)] = module, output  # held: its id must not become another's

    def is_read(module: nn.Module, inputs: tuple, named: dict) -> None:
        runs[module] += 1
        read.append((module, the_input(inputs, named)))

    plain = [module for module in modules if _name(module) in CONVOLUTIONS + NORMS and not _is_watched(module)]
    convolutions: list[Any] = [module for module in plain if _name(module) in CONVOLUTIONS]
    # What a weight is computed from is read elsewhere; such convolutions are not folded.
    reads.written |= {id(own): (module, own) for module in convolutions for own in module.parameters()}
    hooks = [module.register_forward_hook(writes) for module in convolutions]
    hooks += [module.register_forward_pre_hook(is_read, with_kwargs=True) for module in plain if _name(module) in NORMS]
    try:
        with reads:
            yield pairs, small_maps
    finally:
        for hook in hooks:
            hook.remove()
    # One that runs with weights of others, or twice, is left as it is.
    for module in list(small_maps):
        if runs[module] > 1 or any(reads.count[id(parameter)] != 1 for parameter in module.parameters()):
            del small_maps[module]
    for norm, tensor in read:
        convolution, _ = reads.written.get(id(tensor), (None, None))
        # An operation that changes it in place reads it too.
        if convolution is None or reads.count[id(tensor)] != 1:
            continue
        # Another reader of the weights would find them folded.
        alone = all(reads.count[id(parameter)] == 1 for parameter in convolution.parameters())
        if runs[convolution] == runs[norm] == 1 and alone:
            pairs.append(Pair(convolution, norm))


def the_input(inputs: tuple, named: dict) -> Any:
    """What a layer of one argument was called with: by position, or by a name, which is not the same for all."""
    return next(iter((*inputs, *named.values())), None)


def is_compiled(module: nn.Module) -> bool:
    """Whether what the module runs is compiled, and would have to be once more if anything of it were exchanged."""
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody else looks at what passes through the module, or has replaced what it computes."""
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    of_all = everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks
    return any((*own, *of_all)) or "forward" in vars(module)


def _is_plain(convolution: nn.Module) -> bool:
    """Whether it computes what its class says, precisely enough to be computed in another way."""
    weight = convolution._parameters.get("weight")
    exact = _is_ordinary(convolution) and weight is not None and weight.dtype in (torch.float32, torch.float64)
    return exact and not _is_watched(convolution)


def _is_fixed(norm: nn.BatchNorm2d) -> bool:
    """Whether it computes what its class says, of statistics that it has."""
    return norm.running_var is not None and not norm.training and not _is_watched(norm)


def _is_ordinary(convolution: nn.Module) -> bool:
    """Whether the weight is a plain parameter: neither computed from others, nor sharded or quantized."""
    return type(convolution._parameters.get("weight")) is nn.Parameter


@contextmanager
def _folded(
    pairs: Iterable[Pair], small_maps: Mapping[nn.Conv2d, torch.Size], count: int, made: dict[nn.Module, Any]
) -> Iterator[None]:
    norms = {pair.convolution: pair.norm for pair in pairs if _is_plain(pair.convolution) and _is_fixed(pair.norm)}
    # A GPU's library knows of fewer multiplications by itself.
    filtered = {
        convolution: size
        for convolution, size in small_maps.items()
        if count >= LEAST_MAPS
        and _is_plain(convolution)
        and convolution.weight.device.type == "cpu"
        and suits(convolution, size)
    }
    kept = [(convolution, convolution.weight, convolution.bias) for convolution in norms]
    try:
        for convolution, norm in norms.items():
            if convolution not in filtered:
                if convolution not in made:
                    made[convolution] = _fused(convolution, norm)
                convolution.weight, convolution.bias = made[convolution]
            vars(norm)["forward"] = _after(norm)
        for convolution, size in filtered.items():
            if convolution not in made:
                made[convolution] = _by_filtering(convolution, norms.get(convolution), size, count)
            vars(convolution)["forward"] = made[convolution]
        yield
    finally:
        for convolution, weight, bias in kept:
            convolution.weight, convolution.bias = weight, bias
        for module in (*norms.values(), *filtered):
            vars(module).pop("forward", None)


def _fused(convolution: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the two together."""
    if norm is None:
        return convolution.weight, convolution.bias
    mean: Any = norm.running_mean
    variance: Any = norm.running_var
    with torch.no_grad():
        return fuse_conv_bn_weights(
            convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias
        )


def _by_filtering(
    convolution: nn.Conv2d, norm: nn.BatchNorm2d | None, size: torch.Size, count: int
) -> Callable[[Tensor], Tensor]:
    weight, shape = convolution.weight, (convolution.weight.shape[1], *size)
    convolve = minimal_filtering(*_fused(convolution, norm), size, count)

    def forward(input: Tensor) -> Tensor:
        # As another weight may be put into its place for a call.
        expected = convolution.weight is weight and input.dtype == weight.dtype and input.shape[1:] == shape
        if expected and len(input) and not torch.is_autocast_enabled("cpu"):
            return convolve(input)
        # What is fused is not held as well: maps of another size than in the pass that was watched are rare.
        return F.conv2d(input, *_fused(convolution, norm), padding=1)

    return forward


@contextmanager
def _converted(modules: Sequence[nn.Module], images: Tensor, layout: torch.memory_format) -> Iterator[None]:
    """Weights of convolutions in that layout and in the dtype of autocast, which keeps no frozen ones."""
    kind = images.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    kept: list[tuple[Any, nn.Parameter]] = []
    try:
        for module in modules:
            weight = module._parameters.get("weight")
            if (
                weight is not None
                and "forward" not in vars(module)
                and _name(module) in CONVOLUTIONS
                and _is_ordinary(module)
            ):
                kept.append((module, weight))
                converted = weight.detach().to(dtype=dtype, memory_format=layout)
                module.weight = nn.Parameter(converted, requires_grad=False)
        yield
    finally:
        for module, weight in kept:
            module.weight = weight


def _after(norm: Any) -> Callable[..., Tensor]:
    """What a norm still does once it is folded: timm's carry their activation."""
    if _name(norm) == NORMS[0]:
        return _same
    return lambda *inputs, **named: norm.act(norm.drop(the_input(inputs, named)))


def _same(*inputs: Tensor, **named: Tensor) -> Tensor:
    return the_input(inputs, named)


def _name(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__qualname__
