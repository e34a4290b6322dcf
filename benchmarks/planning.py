"""
Planning at full size, with scores given: plans of ResNet-50 and ViT-B/16, units of ConvNeXt-L and Swin-L.

    python benchmarks/planning.py    # writes benchmarks/results/planning.json

Each is timed beside one forward pass of the same network on one image, in turns; the first round is not counted. The
time of a plan holds the trace, the check that a removal is exact, the importances and the search. Forwards are counted
by a hook on every copy of the network: those with values, which cost time, and those on shapes alone; the candidates
are the widths whose MACs the search counted.
"""

import argparse
import gc
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import timm
import torch
from side_by_side import interleaved, ratio, report, table
from torch import nn

from hf_mrpf import plan_pruning, pruning_units
from hf_mrpf.units import UnitGraph

# Seconds on the wall, with two threads on a machine that does nothing else.
PLANS, UNITS = ("resnet50", "vit_base_patch16_224"), ("convnext_large", "swin_large_patch4_window7_224")
TARGETS = dict.fromkeys(PLANS, 3.0) | dict.fromkeys(UNITS, 20.0)


def counted(work: Callable[[], Any], model: nn.Module) -> dict[str, int]:
    """Forwards of the whole network, with values and without, and candidates whose size was counted."""
    counts = {"forwards": 0, "shape_forwards": 0, "sizes": 0}

    def forward(module: nn.Module, inputs: tuple) -> None:
        counts["shape_forwards" if inputs[0].is_meta else "forwards"] += 1

    size = UnitGraph.size

    def sized(graph: UnitGraph, widths: Any) -> dict[str, int]:
        counts["sizes"] += 1
        return size(graph, widths)

    handle = model.register_forward_pre_hook(forward)  # copies of the model have it too
    with patch.object(UnitGraph, "size", sized):
        work()
    handle.remove()
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="Threads that compute on the CPU.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=TARGETS, default=list(TARGETS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    rows: list[dict[str, Any]] = []
    for name in args.networks:
        torch.manual_seed(0)
        model, images = timm.create_model(name).eval(), torch.rand(1, 3, 224, 224)
        scores = {unit.name: 10.0 ** (number % 4) for number, unit in enumerate(pruning_units(model, images))}
        ours = {
            "plan": lambda model=model, images=images, scores=scores: plan_pruning(model, images, scores=scores),
            "units": lambda model=model, images=images: pruning_units(model, images),
        }
        way = "plan" if name in PLANS else "units"

        def pass_(model: nn.Module = model, images: torch.Tensor = images) -> None:
            with torch.no_grad():
                model(images)

        seconds = interleaved({"forward": pass_, way: ours[way]}, args.rounds, device)
        row: dict[str, Any] = {"network": name, "work": way, **counted(ours[way], model)}
        row |= {clock: median(seconds[way][clock]) for clock in ("cpu", "wall")}
        row |= {f"forward_passes_{clock}": 1 / ratio(seconds, way, "forward", clock) for clock in ("cpu", "wall")}
        row |= {"target_wall": TARGETS[name], "seconds": seconds}
        rows.append(row)
        del model, ours
        gc.collect()
    report("planning", device, args.threads, rows)
    heads = ["network", "work", "forwards", "on shapes", "sizes", "CPU s", "wall s", "target s", "in forward passes"]
    keys = ["network", "work", "forwards", "shape_forwards", "sizes", "cpu", "wall", "target_wall"]
    print(table(heads, [[row[key] for key in (*keys, "forward_passes_cpu")] for row in rows]))


if __name__ == "__main__":
    main()
