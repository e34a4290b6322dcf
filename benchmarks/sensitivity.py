"""
Module robustness sensitivity of all modules of a network, beside the loop over modules as it is written down.

    python benchmarks/sensitivity.py                  # on the CPU; writes benchmarks/results/sensitivity.json
    python benchmarks/sensitivity.py --device cuda    # writes benchmarks/results/sensitivity-cuda.json

"naive" is Alg. 1 of RiFT (arXiv 2308.02533) for one module: ten times a forward and a backward to its weights, a step,
the projection, and a forward for the value, in batches of as many images as ours. It is timed on some modules, evenly
spaced over the network, and scaled to all of them. Both start from the same images, as adversarial ones are given and
their attack is not timed, and give the same values, which is checked in float64. Rounds take turns. The agreement of
`ascent` with `exact` is measured on a narrow network after PGD adversarial training (a ResNet, unless a trained one is
named), next to what two disjoint sets of images agree on: the most that one set can tell. There, `exact` is also taken
on four and eight times as many images as `ascent`: few images and few steps rank as well, and cost that much less. On
the same network `exact` is measured in bfloat16 too: on a GPU for its time as well, on a processor for its values
alone.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from robust_evaluation import trained
from side_by_side import clock_of, interleaved, ratio, report, table
from study_networks import base
from torch import Tensor, nn

from hf_mrpf import (
    AttackConfig,
    PrunedForImageClassification,
    load_image_data,
    module_robustness_sensitivity,
    pgd_attack,
)
from hf_mrpf.attacks import DTYPES, logits_of
from hf_mrpf.loader import batches
from hf_mrpf.sensitivity import _mean_spearman

GAMMA, STEPS, BATCH_SIZE = 0.1, 10, 128
# Images that values are compared on: in float64 a pass takes twice the time and more.
CHECKED = 64
LARGE = ("resnet18", "mobilevit_xs")


def passes_in(dtype: str) -> AttackConfig:
    """No attack: the images handed over are adversarial already."""
    return AttackConfig(eps=0, dtype=dtype)


def naive(model: nn.Module, weight: nn.Parameter, images: Tensor, labels: Tensor) -> float:
    """The sensitivity of one module's weight, step by step."""
    parts = list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))
    original, radius = weight.detach().clone(), GAMMA * weight.detach().norm()

    def losses() -> Iterator[Tensor]:
        """Of each batch its share of the mean."""
        for part, its in parts:
            yield F.cross_entropy(logits_of(model(part)), its, reduction="sum") / len(images)

    def value() -> float:
        with torch.no_grad():
            return sum(loss.item() for loss in losses())

    before, best = value(), 0.0
    weight.requires_grad_(True)
    for _ in range(STEPS):
        gradient = torch.zeros_like(weight)
        for loss in losses():
            gradient += torch.autograd.grad(loss, weight)[0]
        with torch.no_grad():
            length = gradient.norm()
            if length == 0:
                break
            move = weight + radius * gradient / length - original
            weight.copy_(original + move * (radius / move.norm()).clamp_max(1))
        best = max(best, value() - before)
    weight.requires_grad_(False)
    with torch.no_grad():
        weight.copy_(original)
    return best


def network(name: str) -> PrunedForImageClassification:
    """
    With random weights, none of which is without a gradient: that would end its measurement.

    Statistics of BatchNorm are those of random images: with others, activations grow from layer to layer, and what
    rounding does to them would be compared.
    """
    start: dict[str, Any] = {"zero_init_last": False} if "resnet" in name else {}
    model = PrunedForImageClassification.from_backbone(name, num_labels=10, image_size=32, small_images=True, **start)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average
    with torch.no_grad():
        for _ in range(4):
            model.train()(torch.rand(32, 3, 32, 32))
    return model.eval()


def scored(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of convolutions and linear layers, by module."""
    kinds = (nn.Conv2d, nn.Linear)
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, kinds)}


def compare(
    name: str, model: nn.Module, images: Tensor, labels: Tensor, sample: int, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Every way to score all modules, beside the naive loop on some of them."""
    weights = scored(model)
    names = list(weights)[:: max(1, len(weights) // sample)]
    values: dict[str, Any] = {}

    def loop() -> None:
        values["naive"] = {module: naive(model, weights[module], images, labels) for module in names}

    def ours(way: str, method: str, count: int, dtype: str) -> Callable[[], None]:
        def run() -> None:
            values[way] = module_robustness_sensitivity(
                model,
                [(images[:count], labels[:count])],
                passes_in(dtype),
                method=method,
                gamma=GAMMA,
                slices={},
                batch_size=BATCH_SIZE,
            )

        return run

    # A processor that has to imitate bfloat16 would only show that.
    ways = WAYS | (HALF_WAYS if device.type == "cuda" else {})
    everything = {way: ours(way, method, len(images) // part, dtype) for way, (method, part, dtype, _) in ways.items()}
    seconds = interleaved({"naive": loop} | everything, rounds, device)
    scale, clock = len(weights) / len(names), clock_of(device)
    error = difference(model, names, images[:CHECKED], labels[:CHECKED])
    rows = []
    for way, (_, part, dtype, target) in ways.items():
        settings = values[way].settings
        rows.append({
            "network": name, "modules": len(weights), "images": len(images) // part, "naive_images": len(images),
            "way": way, "forwards": settings["forwards"], "backwards": settings["backwards"],
            "naive_modules": len(names), "faster": scale * ratio(seconds, way, "naive", clock),
            "wall": scale * ratio(seconds, way, "naive", "wall"), "target": target,
            "error": error if way == "exact" else None, "dtype": dtype, "largest": max(values["naive"].values()),
            "seconds": seconds[way], "naive_seconds": seconds["naive"],
        })  # fmt: skip
    return rows


def difference(model: nn.Module, names: list[str], images: Tensor, labels: Tensor) -> float:
    """
    Largest difference of `exact` from the naive loop, in nats, with both computed in float64.

    Ten steps of ascent in a network with random weights amplify rounding a millionfold: in float32 that would be seen,
    and not whether the two compute the same.
    """
    double, images = copy.deepcopy(model).double(), images.double()
    ours = module_robustness_sensitivity(
        double,
        [(images, labels)],
        passes_in("float32"),
        method="exact",
        gamma=GAMMA,
        slices={},
        groups={name: [name] for name in names},
    )
    weights = scored(double)
    return max(abs(ours[name] - naive(double, weights[name], images, labels)) for name in names)


def growth(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Seconds of `ascent` on ResNet-18 over numbers of images and of modules."""
    torch.manual_seed(0)
    model = network("timm/resnet18").to(device)
    names = list(scored(model))
    rows = []
    for images, modules in ((2, 21), (4, 21), (8, 21), (4, 5), (4, 10)):
        chosen = names[:: len(names) // modules][:modules]
        x, y = torch.rand(images, 3, 32, 32, device=device), torch.randint(0, 10, (images,), device=device)

        def run(x: Tensor = x, y: Tensor = y, chosen: list[str] = chosen) -> None:
            module_robustness_sensitivity(
                model, [(x, y)], passes_in("float32"), groups={name: [name] for name in chosen}, batch_size=2
            )

        seconds = interleaved({"ascent": run}, rounds, device)["ascent"][clock_of(device)]
        rows.append({"images": images, "modules": len(chosen), "seconds": median(seconds)})
    return rows


def agreement(model: nn.Module, images: Tensor, labels: Tensor, attack: AttackConfig) -> dict[str, Any]:
    """
    Spearman of cheaper ways with `exact` on the same two sets of images or on parts of them, mean and least over those.

    Beside them stands what `exact` on one set agrees with `exact` on the other.
    """

    def cut(size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(images.split(size), labels.split(size), strict=True))

    whole = len(images) // 2
    exact = module_robustness_sensitivity(model, cut(whole), attack, method="exact")
    cheaper = []
    for way, method, part in CHEAPER:
        sets = module_robustness_sensitivity(model, cut(whole // part), attack, method=method).per_set
        pairs = [(exact.per_set[number // part], scores) for number, scores in enumerate(sets)]
        values = [_mean_spearman(pair) or 0.0 for pair in pairs]
        cheaper.append({"way": way, "sets": len(values), "mean": fmean(values), "least": min(values)})
    return {"exact_between_two_sets": exact.spearman, "to_exact": cheaper}


def in_bfloat16(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """`exact` in nats, and how far it is off in bfloat16 on the same images, as a fraction of it."""
    single, half = (
        module_robustness_sensitivity(model, [(images, labels)], passes_in(dtype), method="exact") for dtype in DTYPES
    )
    return {name: {"exact": score, "error": abs(half[name] - score) / score} for name, score in single.items()}


# Method, the part of the images that it is given, what it computes in, and how many times faster it is to be.
WAYS: dict[str, tuple[str, int, str, float | None]] = {
    "exact": ("exact", 1, "float32", 3.3),
    "ascent": ("ascent", 1, "float32", None),
    "ascent, a quarter of the images": ("ascent", 4, "float32", 60.0),
    "ascent, an eighth of the images": ("ascent", 8, "float32", 60.0),
    "first_order": ("first_order", 1, "float32", None),
}
CHEAPER = [(way, method, part) for way, (method, part, _, _) in WAYS.items() if way != "exact"]
HALF_WAYS = {"exact, bfloat16": ("exact", 1, "bfloat16", 5.0)}


def large(name: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The ways on a network with random weights."""
    torch.manual_seed(0)
    model = network(name).to(device).requires_grad_(False)
    images = torch.rand(args.images, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (args.images,), device=device)
    rows = compare(name, model, images, labels, args.sample, args.rounds, device)
    print([(row["way"], round(row["faster"], 2), row["error"]) for row in rows], flush=True)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=16, help="Of the two large networks.")
    parser.add_argument("--narrow_images", type=int, default=512, help="Of the narrow one; its ranks take twice them.")
    parser.add_argument(
        "--ranks_only", action="store_true", help="No times; writes results/sensitivity_ranks_BASE.json."
    )
    parser.add_argument(
        "--network", choices=(*LARGE, "narrow"), help="Its times alone; writes sensitivity_NETWORK.json."
    )
    parser.add_argument("--sample", type=int, default=5, help="Modules that the naive loop is timed on.")
    parser.add_argument("--dataset", default="digits", help="For the narrow network; as of recipes/prune.py.")
    parser.add_argument("--base", help="A network of study_networks.py that has been made, instead of training one.")
    parser.add_argument("--epochs", type=int, default=2, help="PGD adversarial training of the narrow network.")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    curve: list[dict[str, Any]] = []
    for name in LARGE:
        if not args.ranks_only and args.network in (None, name):
            rows += large(f"timm/{name}", args, device)
    if not args.ranks_only and args.network in (None, "resnet18"):
        curve = growth(device, args.rounds)
        print(curve, flush=True)
    more: dict[str, Any] = {"growth": curve}
    if args.network not in LARGE:
        narrow, images, labels = narrow_network(args, device)
        half, attack = len(images) // 2, AttackConfig(num_steps=10)
        adversarial = pgd_attack(narrow, images[:half], labels[:half], attack)
        name = args.base or "narrow, robust"
        if not args.ranks_only:
            rows += compare(name, narrow, adversarial, labels[:half], args.sample, args.rounds, device)
        if not args.network:
            more |= {
                "spearman": agreement(narrow, images, labels, attack),
                "bfloat16": in_bfloat16(narrow, adversarial, labels[:half]),
                "dataset": Path(args.dataset).name,
                "narrow": {"network": name, "modules": len(scored(narrow)), "images": half},
            }
    show(rows, more)
    what = f"sensitivity_ranks_{args.base or 'narrow'}" if args.ranks_only else "sensitivity"
    report(f"sensitivity_{args.network}" if args.network else what, device, args.threads, rows, **more)


def narrow_network(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """A trained one, and test images for two sets."""
    data = load_image_data(args.dataset, max_train_samples=10_000, max_eval_samples=2 * args.narrow_images)
    narrow = base(args.base) if args.base else trained(data, AttackConfig(num_steps=10), args.epochs, device)
    images, labels = next(batches(data.test, 2 * args.narrow_images))
    return narrow.to(device).requires_grad_(False), images.to(device), labels.to(device)


def show(rows: list[dict[str, Any]], more: dict[str, Any]) -> None:
    """Prints the tables of what was measured."""
    heads = ["network", "modules", "way", "images", "forwards", "backwards", "faster", "wall", "target"]
    shown = [
        [row["network"], row["modules"], row["way"], f"{row['images']} / {row['naive_images']}", row["forwards"],
         row["backwards"], row["faster"], row["wall"], row["target"],
         "-" if row["error"] is None else f"{row['error']:.1e}"]
        for row in rows
    ]  # fmt: skip
    if rows:
        print(table([*heads, "largest error"], shown))
    if more["growth"]:
        print(table(["images", "modules", "seconds"], [list(row.values()) for row in more["growth"]]))
    if "spearman" not in more:
        return
    found, errors = more["spearman"], sorted(module["error"] for module in more["bfloat16"].values())
    print(f"Spearman of two sets under `exact`: {found['exact_between_two_sets']:.3f}; with `exact`, over sets:")
    ranks = [[row["way"], row["sets"], f"{row['mean']:.3f}", f"{row['least']:.3f}"] for row in found["to_exact"]]
    print(table(["way", "sets", "mean", "least"], ranks))
    print(f"exact in bfloat16, relative error: median {median(errors):.4f}, largest {errors[-1]:.4f}")


if __name__ == "__main__":
    main()
