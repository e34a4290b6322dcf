"""
What pruning is paid for: latency, throughput, memory and file size of dense and of pruned networks, side by side.

    python benchmarks/latency.py                 # on the CPU; writes benchmarks/results/latency.json
    python benchmarks/latency.py --device cuda   # eager PyTorch alone; writes benchmarks/results/latency-cuda.json

Each network is pruned to half and to a quarter of its multiply-accumulates, by the uniform allocation and from random
weights: time depends on shapes alone. On the CPU each is then run in eager PyTorch, as the `.pt2` of `torch.export`
and in onnxruntime; the exported files are for the CPU. Dense and pruned, in every runtime, take turns in one process:
"kept" is the median over rounds of a pruned network's time as a fraction of the dense one's in the same round and
runtime. Peak memory is that of a fresh process which loads the model and runs one batch, over what it held before: the
growth of its resident size, or on a GPU the bytes of tensors. Which multiple widths are rounded to is measured too.
"""

import argparse
import copy
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from memory import MIB, highest, idle
from side_by_side import interleaved, ratio, report, table
from torch import Tensor

from hf_mrpf import PrunedForImageClassification, PruningPlan, count_macs, export_model, plan_pruning, prune
from hf_mrpf.cli import multiple
from hf_mrpf.console import quieten
from hf_mrpf.efficiency import file_size
from hf_mrpf.export import load_exported
from hf_mrpf.report import package_versions

NETWORKS = {
    "resnet18": "timm/resnet18",
    "resnet50": "timm/resnet50",
    "mobilevit_xs": "timm/mobilevit_xs",
    "vit_tiny": "timm/vit_tiny_patch16_224",
}
TARGETS = (0.5, 0.25)
SMALL, LARGE = 1, 64
Way = Callable[[Tensor], Any]


def family(
    name: str, image_size: int, round_to: int | str, device: torch.device
) -> tuple[dict[str, PrunedForImageClassification], dict[str, PruningPlan]]:
    """A network and what is left of it, by `"dense"` and the targets, with the plans."""
    torch.manual_seed(0)
    dense = PrunedForImageClassification.from_backbone(NETWORKS[name], num_labels=1000, image_size=image_size)
    models, plans = {"dense": dense.to(device).eval()}, {}
    for target in TARGETS:
        key, example = f"{target:.0%}", torch.zeros(1, 3, image_size, image_size, device=device)
        plans[key] = plan_pruning(dense, example, target=target, allocation="uniform", round_to=round_to)
        models[key] = prune(copy.deepcopy(dense), plans[key]).requires_grad_(False)
    return models, plans


def written(model: PrunedForImageClassification, folder: Path, device: torch.device) -> dict[str, Path]:
    """Where each runtime's file of a model lies."""
    model.save_pretrained(folder)
    files = {"eager": folder}
    if device.type == "cpu":
        exported = export_model(model, folder)
        files |= {{"pt2": "exported", "onnx": "onnxruntime"}[file.format]: file.path for file in exported}
    return files


def loaded(runtime: str, path: Path, device: torch.device) -> Way:
    """A model as a function of images."""
    if runtime != "eager":
        return load_exported(path)
    model = PrunedForImageClassification.from_pretrained(path).to(device).eval().requires_grad_(False)
    return lambda images: model(images)


def peak(runtime: str, path: Path, shape: tuple[int, ...], device: torch.device, threads: int) -> int:
    """Bytes that loading a model and running one batch take, in this process, which must be fresh."""
    quieten()
    torch.set_num_threads(threads)
    images = torch.rand(shape)
    before = idle(device.type)
    with torch.inference_mode():
        loaded(runtime, path, device)(images.to(device))
    return highest(device.type) - before


def peak_apart(*arguments: Any) -> int:
    """`peak` in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_mrpf.export", "timm", "onnxruntime"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak, *arguments).result()


def passes(ways: dict[str, Way], images: Tensor) -> dict[str, Callable[[], None]]:
    """A forward pass each."""

    def one(way: Way) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                way(images)

        return run

    return {name: one(way) for name, way in ways.items()}


def measure(name: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The rows of a network."""
    models, plans = family(name, args.image_size, args.round_to, device)
    shape = (LARGE, 3, args.image_size, args.image_size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    rows, ways = [], {}
    with TemporaryDirectory() as place:
        for kept, model in models.items():
            plan = plans.get(kept)
            for runtime, path in written(model, Path(place) / kept, device).items():
                ways[f"{kept} {runtime}"] = loaded(runtime, path, device)
                rows.append(
                    {
                        "network": name,
                        "model": kept,
                        "runtime": runtime,
                        "image_size": args.image_size,
                        "macs": count_macs(model, images[:1]),
                        "macs_kept": plan.achieved["macs"] if plan else 1.0,
                        "round_to": plan.round_to if plan else None,
                        "multiples": plan.latency and plan.latency.get("multiples") if plan else None,
                        "file_bytes": file_size(path),
                        "peak_bytes": peak_apart(runtime, path, shape, device, args.threads),
                    }
                )
    for batch, rounds in ((SMALL, args.rounds), (LARGE, args.large_rounds)):
        seconds = interleaved(passes(ways, images[:batch]), rounds, device)
        for row in rows:
            way, dense = f"{row['model']} {row['runtime']}", f"dense {row['runtime']}"
            row[f"batch_{batch}"] = {
                "milliseconds": 1000 * median(seconds[way]["wall"]),
                "images_per_second": batch / median(seconds[way]["wall"]),
                "kept": {clock: 1 / ratio(seconds, way, dense, clock) for clock in ("wall", "cpu")},
                "seconds": seconds[way],
            }
    return rows


def shown(row: dict[str, Any]) -> list[Any]:
    """A row of the table."""
    small, large = row[f"batch_{SMALL}"], row[f"batch_{LARGE}"]
    kept = [f"{timed['kept']['wall']:.2f} / {timed['kept']['cpu']:.2f}" for timed in (small, large)]
    return [
        row["network"], row["model"], row["round_to"], row["runtime"], row["macs_kept"],
        small["milliseconds"], kept[0], large["milliseconds"], kept[1], f"{large['images_per_second']:.0f}",
        f"{row['peak_bytes'] / MIB:.0f}", f"{row['file_bytes'] / 1e6:.1f}",
    ]  # fmt: skip


def compared(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """What the choice of a multiple was made from: a row a plan, a column a multiple."""
    plans = [row for row in rows if row["runtime"] == "eager" and row["multiples"]]
    return [
        [row["network"], row["model"], row["round_to"], *(entry.get("fraction") for entry in row["multiples"].values())]
        for row in plans
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="Threads of PyTorch and onnxruntime alike.")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--round_to", type=multiple, default="auto", help="As of plan_pruning.")
    parser.add_argument("--rounds", type=int, default=31, help=f"At batch {SMALL}.")
    parser.add_argument("--large_rounds", type=int, default=7, help=f"At batch {LARGE}.")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none; leave it out to measure on the CPU.")
    quieten()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.networks:
        rows += measure(name, args, device)
        print(table(HEADS, [shown(row) for row in rows if row["network"] == name]), flush=True)
    runtimes = package_versions("onnx", "onnxruntime") if device.type == "cpu" else {}
    report("latency", device, args.threads, rows, runtimes=runtimes)
    if choices := compared(rows):
        multiples = next(row["multiples"] for row in rows if row["multiples"])
        print(table(["network", "kept", "chosen", *multiples], choices))


HEADS = [
    "network", "model", "round_to", "runtime", "MACs kept", f"ms, batch {SMALL}", "kept, wall / CPU",
    f"ms, batch {LARGE}", "kept, wall / CPU", "images/s", "peak MiB", "file MB",
]  # fmt: skip

if __name__ == "__main__":
    main()
