"""
Module robustness sensitivity of all modules of a network, beside the loop over modules as it is written down.

    python benchmarks/sensitivity.py                  # on the CPU; writes benchmarks/results/sensitivity.json
    python benchmarks/sensitivity.py --device cuda    # writes benchmarks/results/sensitivity-cuda.json

"naive" is Alg. 1 of RiFT (arXiv 2308.02533) for one module: ten times a forward and a backward to its weights, a step,
the projection, and a forward for the value. It is timed on some modules, evenly spaced over the network, and scaled to
all of them. Both start from the same images, as adversarial ones are given and their attack is not timed, and give the
same values. Rounds take turns. The agreement of `ascent` with `exact` is measured on a narrow ResNet after PGD
adversarial training, next to what two disjoint sets of images agree on: the most that one set can tell.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from robust_evaluation import trained
from side_by_side import clock_of, interleaved, ratio, report, table
from torch import Tensor, nn

from hf_mrpf import (
    AttackConfig,
    PrunedForImageClassification,
    load_image_data,
    module_robustness_sensitivity,
)
from hf_mrpf.data import as_pixel_dataset
from hf_mrpf.sensitivity import _mean_spearman

GAMMA, STEPS = 0.1, 10
CLEAN = AttackConfig(eps=0)  # the images handed over are adversarial already
TARGETS = {"exact": 3.3, "ascent": 60.0}


def naive(model: nn.Module, weight: nn.Parameter, images: Tensor, labels: Tensor) -> float:
    """The sensitivity of one module's weight, step by step."""
    original, radius = weight.detach().clone(), GAMMA * weight.detach().norm()
    with torch.no_grad():
        before = F.cross_entropy(model(images).logits, labels).item()
    best = 0.0
    weight.requires_grad_(True)
    for _ in range(STEPS):
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(images).logits, labels), weight)
        with torch.no_grad():
            length = gradient.norm()
            if length == 0:
                break
            move = weight + radius * gradient / length - original
            weight.copy_(original + move * (radius / move.norm()).clamp_max(1))
            best = max(best, F.cross_entropy(model(images).logits, labels).item() - before)
    weight.requires_grad_(False)
    with torch.no_grad():
        weight.copy_(original)
    return best


def network(name: str) -> PrunedForImageClassification:
    """With random weights, none of which is without a gradient: that would end its measurement."""
    start: dict[str, Any] = {"zero_init_last": False} if "resnet" in name else {}
    return PrunedForImageClassification.from_backbone(name, num_labels=10, image_size=32, small_images=True, **start)


def scored(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of convolutions and linear layers, by module."""
    kinds = (nn.Conv2d, nn.Linear)
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, kinds)}


def compare(name: str, batch: int, sample: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """`exact`, `ascent` and `first_order` on all modules beside the naive loop on some."""
    torch.manual_seed(0)
    model = network(name).to(device).eval().requires_grad_(False)
    images, labels = torch.rand(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)
    weights = scored(model)
    names = list(weights)[:: max(1, len(weights) // sample)]
    values: dict[str, Any] = {}

    def loop() -> None:
        values["naive"] = {module: naive(model, weights[module], images, labels) for module in names}

    def ours(method: str) -> Callable[[], None]:
        def run() -> None:
            values[method] = module_robustness_sensitivity(
                model, [(images, labels)], CLEAN, method=method, gamma=GAMMA, batch_size=batch, slices={}
            )

        return run

    seconds = interleaved({"naive": loop} | {method: ours(method) for method in METHODS}, rounds, device)
    scale, clock = len(weights) / len(names), clock_of(device)
    largest = max(values["naive"].values())
    rows = []
    for method in METHODS:
        settings = values[method].settings
        worst = max(abs(values[method][module] - values["naive"][module]) for module in names)
        rows.append({
            "network": name, "modules": len(weights), "batch": batch, "way": method,
            "forwards": settings["forwards"], "backwards": settings["backwards"],
            "naive_modules": len(names), "faster": scale * ratio(seconds, method, "naive", clock),
            "target": TARGETS.get(method), "error": worst if method == "exact" else None,
            "largest": largest, "seconds": seconds[method], "naive_seconds": seconds["naive"],
        })  # fmt: skip
    return rows


def growth(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Seconds of `ascent` on ResNet-18 over numbers of images and of modules."""
    torch.manual_seed(0)
    model = network("timm/resnet18").to(device).eval()
    names = list(scored(model))
    rows = []
    for images, modules in ((4, 21), (8, 21), (16, 21), (8, 5), (8, 10), (8, 21)):
        chosen = names[:: len(names) // modules][:modules]
        x, y = torch.rand(images, 3, 32, 32, device=device), torch.randint(0, 10, (images,), device=device)

        def run(x: Tensor = x, y: Tensor = y, chosen: list[str] = chosen) -> None:
            module_robustness_sensitivity(
                model, [(x, y)], CLEAN, groups={name: [name] for name in chosen}, batch_size=4
            )

        seconds = interleaved({"ascent": run}, rounds, device)["ascent"][clock_of(device)]
        rows.append({"images": images, "modules": len(chosen), "seconds": median(seconds)})
    return rows


def agreement(dataset: str, epochs: int, device: torch.device) -> dict[str, float]:
    """Spearman of `ascent` and of a second set with `exact`, on a robust narrow ResNet."""
    data = load_image_data(dataset, max_train_samples=10_000, max_eval_samples=1000)
    attack = AttackConfig(num_steps=10)
    model = trained(data, attack, epochs, device)
    pixels = as_pixel_dataset(data.test, model.config.image_size)[:256]
    images, labels = pixels["pixel_values"].to(device), torch.as_tensor(pixels["labels"]).to(device)
    sets = [(images[:128], labels[:128]), (images[128:], labels[128:])]
    exact = module_robustness_sensitivity(model, sets, attack, method="exact")
    ascent = module_robustness_sensitivity(model, sets, attack)
    pairs = zip(exact.per_set, ascent.per_set, strict=True)
    return {
        "ascent_to_exact": min(_mean_spearman(pair) or 0.0 for pair in pairs),
        "exact_between_two_sets": exact.spearman or 0.0,
    }


METHODS = ("exact", "ascent", "first_order")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sample", type=int, default=5, help="Modules that the naive loop is timed on.")
    parser.add_argument("--dataset", default="digits", help="For the agreement; as of recipes/prune.py.")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    rows = []
    for name in ("timm/resnet18", "timm/mobilevit_xs"):
        rows += compare(name, args.batch, args.sample, args.rounds, device)
    shown = [
        [row["network"], row["modules"], row["batch"], row["way"], row["forwards"], row["backwards"], row["faster"],
         row["target"], "-" if row["error"] is None else f"{row['error']:.1e}"]
        for row in rows
    ]  # fmt: skip
    heads = ["network", "modules", "images", "method", "forwards", "backwards", "faster", "target", "largest error"]
    print(table(heads, shown), flush=True)
    curve = growth(device, args.rounds)
    print(table(["images", "modules", "seconds"], [list(row.values()) for row in curve]), flush=True)
    found = agreement(args.dataset, args.epochs, device)
    print(", ".join(f"Spearman, {name.replace('_', ' ')}: {value:.3f}" for name, value in found.items()))
    sys.argv = [Path(argument).name if Path(argument).is_dir() else argument for argument in sys.argv]
    name = f"sensitivity{'' if device.type == 'cpu' else '-cuda'}"
    report(name, device, args.threads, rows, growth=curve, spearman=found, dataset=Path(args.dataset).name)


if __name__ == "__main__":
    main()
