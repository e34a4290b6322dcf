"""How much each channel of a unit matters: importances by name, and the gradients that they need."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import logits_of
from .modes import eval_mode
from .processes import Processes
from .weight_scores import first_order, l1_norms, lamp_norms, second_order, squared_norms, summed_distances

if TYPE_CHECKING:
    from torch_pruning.dependency import Group

Batches = Iterable[tuple[Tensor, Tensor]]
_NO_IMAGES = "importance {!r} needs images to take gradients on; batches are empty."


def magnitude(
    model: nn.Module, groups: Mapping[str, "Group"], batches: Batches, seed: int, processes: Processes | None = None
) -> dict[str, Tensor]:
    """
    Squared l2 norm of all weights that a channel touches, relative to the unit's mean (group magnitude, p = 2,
    [DepGraph](https://huggingface.co/papers/2301.12900)). As in torch-pruning, whose figures these are where no
    convolution is grouped, depthwise filters count nothing.

    Args:
        model (`nn.Module`): model that the groups were traced on.
        groups (`Mapping[str, Group]`): torch-pruning's group with all channels of each unit.
        batches (`Iterable[tuple[Tensor, Tensor]]`): adversarial images `[N, 3, H, W]` in [0, 1] and labels `[N]`; only
            the data-driven importances read them.
        seed (`int`): seed of the random importance.
        processes ([`Processes`], *optional*): who sums up gradients together, each on `batches` of its own.

    Returns:
        `dict[str, Tensor]`: for each unit one finite score a channel, `[width]`, on the CPU; higher is kept first.

    Raises:
        ValueError: if a score is not finite.
    """
    return _score(squared_norms, groups)


def random(
    model: nn.Module, groups: Mapping[str, "Group"], batches: Batches, seed: int, processes: Processes | None = None
) -> dict[str, Tensor]:
    """Uniform noise in [0, 1) from `seed`: the control. Arguments and result as for [`magnitude`]."""
    from torch_pruning.pruner.importance import RandomImportance

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: it seeds the generators of all GPUs too, which are not forked.
        torch.default_generator.manual_seed(seed)
        return _score(RandomImportance(), groups)


def l1(
    model: nn.Module, groups: Mapping[str, "Group"], batches: Batches, seed: int, processes: Processes | None = None
) -> dict[str, Tensor]:
    """
    Sum of the absolute weights of the filters that write a channel, over all layers that do ([Pruning
    Filters](https://huggingface.co/papers/1608.08710)). Arguments and result as for [`magnitude`].
    """
    return _score(l1_norms, groups)


def fpgm(
    model: nn.Module, groups: Mapping[str, "Group"], batches: Batches, seed: int, processes: Processes | None = None
) -> dict[str, Tensor]:
    """
    Sum of the distances from a channel's filters to those of the unit's other channels: least for what lies next to
    their geometric median ([FPGM](https://huggingface.co/papers/1811.00250)). Arguments and result as for
    [`magnitude`].
    """
    # torch-pruning's FPGMImportance takes distances between squared weights, which have no signs, and of readers too.
    return _score(summed_distances, groups)


def lamp(
    model: nn.Module, groups: Mapping[str, "Group"], batches: Batches, seed: int, processes: Processes | None = None
) -> dict[str, Tensor]:
    """
    Squared norm of a channel over the summed norm of all that are at least as large, which compares between units
    ([LAMP](https://huggingface.co/papers/2010.07611)). Norms, arguments and result as for [`magnitude`].
    """
    return _score(lamp_norms, groups)


def taylor(
    model: nn.Module, groups: Mapping[str, "Group"], batches: Batches, seed: int, processes: Processes | None = None
) -> dict[str, Tensor]:
    """
    First-order change of the adversarial cross-entropy, sum of |weight * gradient| over the weights that a channel
    touches ([Molchanov et al., 2019](https://huggingface.co/papers/1906.10771)); like torch-pruning without depthwise
    filters and BatchNorm's own scales. Arguments and result as for [`magnitude`]; `batches` must not be empty.
    """
    with _borrowed_gradients(model) as parameters:
        count = 0
        for images, labels in batches:
            F.cross_entropy(logits_of(model(images)), labels, reduction="sum").backward()
            count += len(labels)
        _complete(parameters, count, "taylor", processes or Processes())
        return _score(first_order, groups)


def hessian(
    model: nn.Module, groups: Mapping[str, "Group"], batches: Batches, seed: int, processes: Processes | None = None
) -> dict[str, Tensor]:
    """
    Second-order change of the adversarial cross-entropy, sum of weight^2 times the mean squared gradient of single
    images ([Optimal Brain
    Damage](https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html) with the
    empirical Fisher diagonal), like torch-pruning without depthwise filters. Arguments and result as for [`magnitude`];
    `batches` must not be empty. One forward and one backward pass an image.
    """
    with _borrowed_gradients(model) as parameters:
        squares = [torch.zeros_like(parameter) for parameter in parameters]
        count = 0
        for images, labels in batches:
            # One graph of them all would be walked in full for each.
            for image, label in zip(images.split(1), labels.split(1), strict=True):
                loss = F.cross_entropy(logits_of(model(image)), label)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for square, gradient in zip(squares, gradients, strict=True):
                    if gradient is not None:
                        square.addcmul_(gradient, gradient)
                count += 1
        for parameter, square in zip(parameters, squares, strict=True):
            parameter.grad = square
        _complete(parameters, count, "hessian", processes or Processes())
        return _score(second_order, groups)


def fisher(
    model: nn.Module, groups: Mapping[str, "Group"], batches: Batches, seed: int, processes: Processes | None = None
) -> dict[str, Tensor]:
    """
    Second-order change of the adversarial cross-entropy where a gate on the channel closes: half the mean over images
    of the squared derivative of one image's loss by that gate, which stands at 1 ([Fisher
    pruning](https://huggingface.co/papers/1801.05787)).

    One gate is shared by all layers that read the channel, so that their derivatives are summed before the square
    ([Group Fisher](https://huggingface.co/papers/2108.00708)); where the unit has no layer that reads, as for queries
    and keys, it is on what is written. Scores are in nats and compare between units. Arguments and result as for
    [`magnitude`]; `batches` must not be empty. One forward and one backward pass an image.
    """
    own = {id(parameter) for parameter in model.parameters()}
    sides = {name: _gated_sides(group, own) for name, group in groups.items()}
    totals = {name: torch.zeros_like(counts) for name, (_, counts) in sides.items()}
    processes, count = processes or Processes(), 0
    with _borrowed_gradients(model) as parameters:
        device = parameters[0].device
        for images, labels in batches:
            # Alone, since a layer may see parts of images, such as windows, where others see the batch.
            for image, label in zip(images.split(1), labels.split(1), strict=True):
                loss = F.cross_entropy(logits_of(model(image)), label)
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                gradients = {id(parameter): gradient for parameter, gradient in zip(parameters, found, strict=True)}
                for name, derivative in _by_gate(sides, gradients).items():
                    totals[name] += (derivative / sides[name][1]).square()
                count += 1
    sums = [total.to(device) for total in totals.values()]
    processes.sum_(sums)
    count = sum(processes.gather(count))
    if count == 0:
        raise ValueError(_NO_IMAGES.format("fisher"))
    scores = {name: (total / (2 * count)).cpu() for name, total in zip(totals, sums, strict=True)}
    for name, score in scores.items():
        _check_finite(name, score)
    return scores


def get_importance(name: str) -> Callable[..., dict[str, Tensor]]:
    """The importance function of that name; a ValueError lists the known ones."""
    if name not in IMPORTANCES:
        raise ValueError(f"importance is {name!r}; known importances: {', '.join(IMPORTANCES)}.")
    return IMPORTANCES[name]


def _score(importance: Callable[["Group"], Tensor], groups: Mapping[str, "Group"]) -> dict[str, Tensor]:
    scores = {}
    for name, group in groups.items():
        # A unit whose weights (or gradients) are all zero makes 0/0 of the normaliser: no channel is preferred.
        score = importance(group).detach().float().cpu()
        if score.isnan().all():
            score = torch.zeros_like(score)
        _check_finite(name, score)
        scores[name] = score
    return scores


def _check_finite(unit: str, score: Tensor) -> None:
    if not score.isfinite().all():
        raise ValueError(f"the importance of unit {unit!r} is not finite; are its weights?")


def _reads(item: Any) -> bool:
    import torch_pruning as tp

    return item.dep.pruning_fn in (tp.prune_conv_in_channels, tp.prune_linear_in_channels)


def _gated_sides(group: "Group", own: set[int]) -> tuple[list, Tensor]:
    """Where the gates of a group are, and for each how many copies of the channel to average its derivative over."""
    width = 1 + max(group[0].root_idxs)
    if reading := [item for item in group.items if _reads(item)]:
        return reading, torch.ones(width, dtype=torch.float32, device="cpu")
    # Of a product, the derivative by a gate on either factor is that by a gate on the product.
    writing = [item for item in group.items if item.dep.layer.weight.ndim > 1 and id(item.dep.layer.weight) in own]
    counts = torch.zeros(width, dtype=torch.float32, device="cpu")
    for item in writing:
        counts.index_add_(0, _on_cpu(item.root_idxs), counts.new_ones(len(item.root_idxs)))
    return writing, counts


def _by_gate(sides: Mapping[str, tuple[list, Tensor]], gradients: Mapping[int, Tensor | None]) -> dict[str, Tensor]:
    """Derivative of a loss by a gate on each channel of each unit: the sum over what the gate scales."""
    totals = {name: torch.zeros_like(counts) for name, (_, counts) in sides.items()}
    found = [
        (totals[name], item, derivative)
        for name, (items, _) in sides.items()
        for item in items
        if (derivative := _by_channel(item, gradients)) is not None
    ]
    if found:
        # In one copy: each would wait for the device.
        whole = torch.cat([derivative for *_, derivative in found]).cpu()
        parts = whole.split([len(derivative) for *_, derivative in found])
        for (total, item, _), part in zip(found, parts, strict=True):
            total.index_add_(0, _on_cpu(item.root_idxs), part[_on_cpu(item.idxs)])
    return totals


def _by_channel(item: Any, gradients: Mapping[int, Tensor | None]) -> Tensor | None:
    """Sum of weight * gradient over each channel of a layer's side; None where the loss does not reach it."""
    layer = item.dep.layer
    gradient = gradients.get(id(layer.weight))
    if gradient is None:
        return None
    products = layer.weight.detach() * gradient
    if _reads(item):
        parts = getattr(layer, "groups", 1)
        return products.reshape(parts, -1, products.shape[1], products[0, 0].numel()).sum((1, 3)).flatten().float()
    derivative = products.flatten(1).sum(1)
    if layer.bias is not None and (bias := gradients.get(id(layer.bias))) is not None:
        derivative = derivative + layer.bias.detach() * bias
    return derivative.float()


def _on_cpu(indices: list[int]) -> Tensor:
    return torch.tensor(indices, device="cpu")


def _complete(parameters: list[nn.Parameter], count: int, name: str, processes: Processes) -> None:
    """Sums `.grad` over the processes. Scores read every weight's: where the loss does not reach, it is zero."""
    if sum(processes.gather(count)) == 0:
        raise ValueError(_NO_IMAGES.format(name))
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    processes.sum_(gradients)


@contextmanager
def _borrowed_gradients(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Eval mode, every parameter trainable and without gradient; afterwards all of it is as it was."""
    parameters = list(model.parameters())
    before = [(parameter.grad, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        with eval_mode(model), torch.enable_grad():
            yield parameters
    finally:
        for parameter, (gradient, flag) in zip(parameters, before, strict=True):
            parameter.grad = gradient
            parameter.requires_grad_(flag)


IMPORTANCES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "magnitude": magnitude,
    "random": random,
    "taylor": taylor,
    "hessian": hessian,
    "lamp": lamp,
    "fisher": fisher,
    "l1": l1,
    "fpgm": fpgm,
}
