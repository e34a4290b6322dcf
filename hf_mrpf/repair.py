"""Without training: refit the layers that lost inputs in closed form."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import AttackConfig
from .calibration import attacked_batches
from .folding import the_input
from .modes import eval_mode
from .plan import PruningPlan, trace_for
from .processes import Processes
from .units import UnitGraph
from .weight_scores import precise

MAX_INPUTS = 8192
# Elements of one block of image patches: 64 MB in float64.
_BLOCK = 2**23

Layer = nn.Conv2d | nn.Linear
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RepairReport:
    """
    What [`repair`] did.

    Attributes:
        errors (`dict[str, tuple[float, float]]`):
            For each repaired layer its mean squared output error on the calibration images before and after, relative
            to its mean squared output, with inputs as the dense model computes them. The second is never the larger.
        left (`dict[str, str]`):
            Layers that lost inputs and were left as they are, with the reason.
    """

    errors: dict[str, tuple[float, float]]
    left: dict[str, str]


def repair(
    pruned: nn.Module,
    dense: nn.Module,
    plan: PruningPlan,
    batches: Batches,
    attack: AttackConfig | None,
    *,
    damping: float = 1e-3,
    seed: int = 0,
    distributed: bool = False,
) -> RepairReport:
    """
    Refit every layer that lost inputs, so that what is left of them gives the dense model's outputs best.

    For a layer with kept inputs K, kept outputs O and second moment C of its input patches in the dense model, the new
    weight is the least-squares one `W' = W[O] (C[:, K] + lam E) (C[K, K] + lam I)^-1`. `E` takes W to its kept columns:
    the ridge pulls towards the weights as they were, not towards zero, so that no layer's error can grow and one that
    lost nothing does not change. A layer with a bias has a constant 1 among its inputs, and its bias is refitted as
    well.

    Args:
        pruned (`nn.Module`):
            What [`prune`] made of a copy of `dense` by `plan`. Changed in place.
        dense (`nn.Module`):
            The model that was planned on. Not changed.
        plan ([`PruningPlan`]):
            The plan that was applied.
        batches (`Iterable[tuple[Tensor, Tensor]]`):
            Calibration images `[N, 3, H, W]` in [0, 1] and labels `[N]`.
        attack ([`AttackConfig`], *optional*):
            Makes the adversarial images of `dense` that the moments are taken on beside the clean ones; with None they
            are taken on clean ones alone.
        damping (`float`, *optional*, defaults to 1e-3):
            `lam` as a fraction of the mean diagonal of `C[K, K]`, more than 0.
        seed (`int`, *optional*, defaults to 0):
            Of the attack's random starts.
        distributed (`bool`, *optional*, defaults to `False`):
            Whether every process of the group makes this same call: each then takes a share of the images, and all
            refit alike.

    Returns:
        [`RepairReport`]. Depthwise and grouped convolutions, those with other than zero padding of fixed size and
        layers of more than 8,192 inputs are left and named.

    Raises:
        ValueError: If damping is not positive, there are no images, or the models are not those of the plan.
    """
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < float("inf"):
        raise ValueError(f"damping is {damping!r}; a positive number is needed.")
    graph = trace_for(plan, dense)
    removed = graph.removed_positions(plan.kept)
    plain = {key: indices for key, indices in removed.items() if graph.layers[key[0]].kind != "parameter"}
    _check_models(pruned, dense, {key: gone for key, gone in plain.items() if graph.layers[key[0]].groups == 1})
    repairable, left = repairable_layers(dense, graph, plan.kept)
    moments = input_moments(dense, repairable, batches, attack, seed=seed, processes=Processes.of(distributed))
    # Popped, so that each moment's memory is free once its layer is done.
    return RepairReport(refit_layers(pruned, dense, graph, plan.kept, repairable, moments.pop, damping=damping), left)


def repairable_layers(dense: nn.Module, graph: UnitGraph, kept: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """
    Find the layers that lose inputs where `kept` (as in [`PruningPlan`]) stays.

    Returns:
        `tuple[list[str], dict[str, str]]`: those that [`repair`] refits, and those that it leaves, with the reason.
    """
    left, repairable = {}, []
    for layer, side in graph.removed_positions(kept):
        if side == "out" or graph.layers[layer].kind in ("norm", "parameter"):
            continue
        reason = _reason_to_leave(dense.get_submodule(layer))
        if reason is None:
            repairable.append(layer)
        else:
            left[layer] = reason
    return repairable, left


def refit_layers(
    pruned: nn.Module,
    dense: nn.Module,
    graph: UnitGraph,
    kept: Mapping[str, Any],
    layers: Sequence[str],
    moment: Callable[[str], Tensor],
    *,
    damping: float = 1e-3,
) -> dict[str, tuple[float, float]]:
    """
    Refit `layers` of a pruned copy by the moments of their inputs in the dense model: [`repair`] without measuring.

    Args:
        pruned (`nn.Module`), dense (`nn.Module`), damping (`float`): as for [`repair`].
        graph ([`UnitGraph`]): units of `dense`.
        kept (`Mapping`): what of them is left in `pruned`, as in [`PruningPlan`].
        layers (`Sequence[str]`): which layers, of those of [`repairable_layers`].
        moment (`Callable[[str], Tensor]`): moment of a layer by its name, as [`input_moments`] gives it.

    Returns:
        `dict[str, tuple[float, float]]`: as `RepairReport.errors`.
    """
    removed, errors = graph.removed_positions(kept), {}
    for layer in layers:
        old, new = cast(Layer, dense.get_submodule(layer)), cast(Layer, pruned.get_submodule(layer))
        outputs = _kept(graph.layers[layer].outs, removed.get((layer, "out"), []))
        channels = _kept(graph.layers[layer].ins, removed[layer, "in"])
        scale = graph.folded_scale(kept, layer)
        errors[layer] = _refit(old, new, outputs, channels, moment(layer), damping, scale)
    return errors


def _check_models(pruned: nn.Module, dense: nn.Module, removed: dict[tuple[str, str], list[int]]) -> None:
    lost: dict[str, list[int]] = {}
    for (layer, side), indices in removed.items():
        lost.setdefault(layer, [0, 0])[1 if side == "in" else 0] = len(indices)
    layers = dict(pruned.named_modules())
    for layer, (outs, ins) in lost.items():
        before = dense.get_submodule(layer).weight
        after = getattr(layers.get(layer), "weight", None)
        if not isinstance(before, Tensor):
            continue
        expected = [before.shape[0] - outs, *(size - ins * (axis == 0) for axis, size in enumerate(before.shape[1:]))]
        if not isinstance(after, Tensor) or list(after.shape) != expected:
            found = list(after.shape) if isinstance(after, Tensor) else "absent"
            raise ValueError(
                f"layer {layer!r} of the pruned model is {found}, and {expected} by the plan: hand over prune(copy of "
                "dense, plan) and the dense model itself."
            )


def _reason_to_leave(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1:
            return "depthwise: it mixes no channels" if layer.groups == layer.in_channels else "a grouped convolution"
        if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return "padding that is not a fixed number of zeros"
    inputs = cast(nn.Linear, layer).weight[0].numel()
    return f"{inputs:,} inputs are more than {MAX_INPUTS:,}" if inputs > MAX_INPUTS else None


def input_moments(
    dense: nn.Module,
    layers: Sequence[str],
    batches: Batches,
    attack: AttackConfig | None,
    *,
    seed: int = 0,
    processes: Processes,
) -> dict[str, Tensor]:
    """Mean of x x^T, float64, over all input patches x of each layer; with a last input of 1 where it has a bias."""
    sums = {name: _no_moment(dense.get_submodule(name)) for name in layers}
    counts = dict.fromkeys(layers, 0)

    def accumulate(name: str, module: nn.Module, inputs: Tensor) -> None:
        for patches in _patches(module, inputs):
            if module.bias is not None:
                patches = torch.cat([patches, patches.new_ones(len(patches), 1)], dim=1)
            # Rounded to float32, a moment of many inputs would not be positive definite.
            patches = precise(patches)
            sums[name].addmm_(patches.T, patches)
            counts[name] += len(patches)

    seen = 0
    with eval_mode(dense):
        for batch in attacked_batches(dense, batches, attack or AttackConfig(eps=0), seed=seed, processes=processes):
            seen += len(batch.images)
            with torch.no_grad(), _hooked(dense, layers, accumulate):
                for view in (batch.images,) if attack is None else (batch.images, batch.adversarial):
                    dense(view)
    if sum(processes.gather(seen)) == 0:
        raise ValueError("batches are empty; the repair needs calibration images.")
    processes.sum_(list(sums.values()))
    totals = [sum(shares) for shares in zip(*processes.gather(list(counts.values())), strict=True)]
    return {name: sums[name] / total for name, total in zip(counts, totals, strict=True)}


def _no_moment(layer: nn.Module) -> Tensor:
    weight = cast(Layer, layer).weight
    inputs = weight[0].numel() + (layer.bias is not None)
    return precise(weight.new_empty(0)).new_zeros(inputs, inputs)


@contextmanager
def _hooked(model: nn.Module, layers: Sequence[str], see: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Show `see` the input of each named layer, during forward passes inside the context only (no attack's)."""

    def hook(name: str) -> Callable[[nn.Module, tuple, dict], None]:
        return lambda module, inputs, named: see(name, module, the_input(inputs, named))

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _patches(module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """Input patches as rows `[n, inputs]`, in the order of `weight.flatten(1)`, in blocks of bounded size."""
    if isinstance(module, nn.Linear):
        yield from inputs.flatten(0, -2).split(max(1, _BLOCK // inputs.shape[-1]))
        return
    conv = cast(nn.Conv2d, module)
    padding = cast(tuple[int, int], conv.padding)
    size = conv.weight[0].numel() * inputs.shape[-1] * inputs.shape[-2]
    for images in inputs.split(max(1, _BLOCK // size)):
        columns = F.unfold(images, conv.kernel_size, conv.dilation, padding, conv.stride)
        yield columns.transpose(1, 2).flatten(0, 1)


def _kept(count: int, removed: list[int]) -> list[int]:
    gone = set(removed)
    return [index for index in range(count) if index not in gone]


@torch.no_grad()
def _refit(
    old: Layer,
    new: Layer,
    outputs: list[int],
    channels: list[int],
    moment: Tensor,
    damping: float,
    scale: list[float] | None,
) -> tuple[float, float]:
    weight = precise(old.weight)[outputs].flatten(1)
    size = weight.shape[1] // old.weight.shape[1]
    columns = [channel * size + tap for channel in channels for tap in range(size)]
    if old.bias is not None:
        weight = torch.cat([weight, precise(old.bias)[outputs, None]], dim=1)
        columns.append(weight.shape[1] - 1)
    gram = moment[columns][:, columns]
    ridge = damping * gram.diagonal().mean()
    ridge = ridge if ridge > 0 else gram.new_ones(())
    target = weight @ moment[:, columns] + ridge * weight[:, columns]
    gram.diagonal().add_(ridge)
    refitted = torch.cholesky_solve(target.T, torch.linalg.cholesky(gram)).T

    def error(kept: Tensor) -> float:
        difference = weight.clone()
        difference[:, columns] -= kept
        whole = ((weight @ moment) * weight).sum()
        return (((difference @ moment) * difference).sum() / whole).item() if whole > 0 else 0.0

    before, after = error(weight[:, columns]), error(refitted)
    if scale is not None:
        refitted = refitted * refitted.new_tensor(scale)[:, None]
    if new.bias is not None:
        new.bias.copy_(refitted[:, -1])
        refitted = refitted[:, :-1]
    new.weight.copy_(refitted.reshape(new.weight.shape))
    return before, after
