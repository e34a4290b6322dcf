"""
Passes of a network from some weights on: what it computes before it first reads them is computed once and kept.

Nothing is known of the network but its modules. In a pass that is stopped where a weight is read, no module that has
ended by then depends on that weight; later passes take its output instead of running it. Operations outside of such
modules run again, and of outputs only those are kept that they, or the rest of the network, still need.
"""

import logging
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from .folding import is_compiled

LOGGER = logging.getLogger("hf_mrpf")
Kept = tuple[Any, int | None]  # what a module returned, and the place of the argument that this was


class Prefix:
    """
    A network and one batch of images that it will be run on many times, with different values of some weights.

    Args:
        model (`nn.Module`): in eval mode; a pass does not depend on those before it.
        images (`Tensor` of shape `[N, 3, H, W]`): what it is run on.
        tells (`bool`, *optional*, defaults to `True`): whether the log says where passes are whole ones.
    """

    def __init__(self, model: nn.Module, images: Tensor, *, tells: bool = True):
        self.model, self.images = model, images
        self._level = logging.INFO if tells else logging.DEBUG
        self._kept: dict[nn.Module, list[Kept]] = {}
        self._read: set[int] = set()  # parameters that what is kept was computed with
        self._compiled = any(is_compiled(module) for module in model.modules())
        if self._compiled:
            LOGGER.log(self._level, "Every pass is a whole one: this %s is compiled.", type(model).__name__)

    def stop_before(self, weights: Iterable[Tensor]) -> None:
        """
        Keeps what is computed before the first of the weights is read; other weights must stay as they are from now on.

        What is kept already is made use of where weights come in the order in which the network reads them. Passes of a
        compiled network stay whole, as do others while something overwrites what a module has returned to it.
        """
        if self._compiled:
            return
        weights = list(weights)
        if any(id(weight) in self._read for weight in weights):
            self.let_go()
        run = _modules_run(self.model, self._kept)
        watch = _Watch(weights, {module for module in run if module._forward_hooks}, self._level)
        # Let go of as it is taken: what this object alone still holds is not needed any more.
        taken = {module: _emptied(outputs) for module, outputs in self._kept.items()}
        with torch.no_grad(), _replayed(taken), _hooked(run, watch), watch, suppress(_WeightIsRead):
            self.model(self.images)
        self._kept = watch.kept
        self._read = self._read | watch.parameters if watch.kept else set()

    def let_go(self) -> None:
        """Passes are whole ones again."""
        self._kept, self._read = {}, set()

    def __call__(self) -> Any:
        """What the model returns for the images, at its present weights."""
        # Copies: an operation may overwrite what it is given, as a residual that is added in place does.
        copies = {module: map(_copy, outputs) for module, outputs in self._kept.items()}
        with _replayed(copies):
            return self.model(self.images)


class _WeightIsRead(Exception):
    """Ends a pass where a weight is read."""


class ReadingOrder(TorchDispatchMode):
    """
    Notes, while it is entered, in which order weights are read first.

    Args:
        weights (`Iterable[Tensor]`): those to look for.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = {id(weight) for weight in weights}
        self.seen: dict[int, int] = {}

    def place(self, weight: Tensor) -> int:
        """How many others were read before it; those that were not read come last."""
        return self.seen.get(id(weight), len(self.weights))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if id(value) in self.weights:
                self.seen.setdefault(id(value), len(self.seen))
        return func(*args, **(kwargs or {}))


class _Ended(NamedTuple):
    """A call of a module that has ended."""

    module: nn.Module
    output: Any
    versions: list[int]
    place: int | None  # of the argument that it has returned, changed in place or as it was


class _Versions(WeakTensorKeyDictionary):
    """Which versions of tensors were read; a tensor that is gone is forgotten, as its id may become another's."""

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.setdefault(tensor, set()).add(tensor._version)

    def add_all(self, others: "_Versions") -> None:
        for tensor, versions in others.items():
            self.setdefault(tensor, set()).update(versions)


class _Call:
    """A call of a module that has not ended: what it was given and has read, and the calls in it that have ended."""

    def __init__(self, given: Any = ()) -> None:
        self.given = [(leaf, leaf._version) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        self.read = _Versions()
        self.ended: list[_Ended] = []


class _Watch(TorchDispatchMode):
    """Follows a pass until a weight is read; `kept` is then what modules that have ended returned, call by call."""

    def __init__(self, weights: Iterable[Tensor], watched: Container[nn.Module], level: int) -> None:
        super().__init__()
        self.weights = {id(weight) for weight in weights}
        self.watched, self.level = watched, level
        self.parameters: set[int] = set()
        self.open = [_Call()]
        self.kept: dict[nn.Module, list[Kept]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if any(id(tensor) in self.weights for tensor in tensors):
            # Here, the frames of calls that have not ended still hold the tensors that they will need.
            self._keep()
            raise _WeightIsRead
        self.parameters |= {id(tensor) for tensor in tensors if isinstance(tensor, nn.Parameter)}
        self.open[-1].read.add(tensors)
        return func(*args, **(kwargs or {}))

    def starts(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.open.append(_Call((args, kwargs)))

    def ends(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        call = self.open.pop()
        place = next((index for index, value in enumerate(args) if value is output), None)
        changed = [leaf for leaf, version in call.given if leaf._version != version]
        overwrites = any(leaf is not output or place is None for leaf in changed)
        if overwrites or module in self.watched or not all(map(_is_plain, tree_leaves(output))):
            # It changes more than it returns, hooks of others would be applied twice, or what it returns can't be
            # copied: it runs and reads again, and what it calls is taken from what is kept.
            self.open[-1].read.add_all(call.read)
            self.open[-1].ended += call.ended
        else:
            versions = [_version(leaf) for leaf in tree_leaves(output)]
            self.open[-1].ended.append(_Ended(module, output, versions, place))

    def _keep(self) -> None:
        read = _Versions()
        for call in self.open:
            read.add_all(call.read)
        ended = [entry for call in self.open for entry in call.ended]
        for call in self.open:
            call.ended = []
        last = ended[-1].module if ended else None
        references = _references(ended, read)
        if last is not None and not references:
            name = type(last).__name__
            LOGGER.log(self.level, "Passes are whole ones up to %s: an output before it is overwritten.", name)
        # Only now does nobody hold an output that is not needed.
        for module, leaves, shape, place in references:
            output = tree_unflatten([leaf() for leaf in leaves], shape)
            self.kept.setdefault(module, []).append((output, place))


def _references(
    ended: list[_Ended], read: Mapping[Tensor, set[int]]
) -> list[tuple[nn.Module, list[Callable[[], Any]], Any, int | None]]:
    """What ended calls returned, leaf by leaf; nothing where an operation that would run again has overwritten some."""
    references = []
    while ended:
        module, output, versions, place = ended.pop(0)
        leaves, shape = tree_flatten(output)
        needed = [
            isinstance(leaf, Tensor) and version in read.get(leaf, ())
            for leaf, version in zip(leaves, versions, strict=True)
        ]
        if any(now and _version(leaf) != then for now, leaf, then in zip(needed, leaves, versions, strict=True)):
            return []
        references.append((module, [_reference(*pair) for pair in zip(leaves, needed, strict=True)], shape, place))
    return references


def _is_plain(leaf: Any) -> bool:
    """Whether a part of an output is copied from pass to pass, or never changes."""
    return isinstance(leaf, Tensor | int | float | str | None)


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) else 0


def _reference(leaf: Any, needed: bool) -> Callable[[], Any]:
    """Gives the leaf back; for a tensor that nobody needs or holds, one of its shape that takes no memory."""
    if needed or not isinstance(leaf, Tensor):
        return lambda: leaf
    held, empty = weakref.ref(leaf), leaf.new_empty(()).expand(leaf.shape)
    return lambda: empty if held() is None else held()


def _modules_run(model: nn.Module, kept: Container[nn.Module]) -> set[nn.Module]:
    """Those that a pass calls; what is inside of a kept one is left out, which runs again if it is called after all."""
    found, left = set(), [model]
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left += () if module in kept else module.children()
    return found


@contextmanager
def _hooked(modules: Iterable[nn.Module], watch: _Watch) -> Iterator[None]:
    hooks = []
    try:
        for module in modules:
            hooks += [module.register_forward_pre_hook(watch.starts, with_kwargs=True)]
            hooks += [module.register_forward_hook(watch.ends, with_kwargs=True)]
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replayed(kept: Mapping[nn.Module, Iterable[Kept]]) -> Iterator[None]:
    """Modules return what is kept of their calls; further calls of them are made as ever."""
    before = {module: vars(module).get("forward") for module in kept}
    try:
        for module, outputs in kept.items():
            vars(module)["forward"] = _replay(iter(outputs), module.forward)
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


def _copy(kept: Kept) -> Kept:
    leaves, shape = tree_flatten(kept[0])
    # Clones of what takes no memory would take some.
    copies = [leaf.clone() if isinstance(leaf, Tensor) and not _is_empty(leaf) else leaf for leaf in leaves]
    return tree_unflatten(copies, shape), kept[1]


def _is_empty(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and not any(tensor.stride())


def _emptied(outputs: list[Kept]) -> Iterator[Kept]:
    while outputs:
        yield outputs.pop(0)


def _replay(outputs: Iterator[Kept], forward: Callable[..., Any]) -> Callable[..., Any]:
    def replay(*args: Any, **kwargs: Any) -> Any:
        kept = next(outputs, None)
        if kept is None:
            return forward(*args, **kwargs)
        output, place = kept
        if place is None or _is_empty(args[place]) or _is_empty(output):
            return output
        # Who called may go on with the argument, and not with what is returned.
        return args[place].copy_(output)

    return replay
