"""
Images a second of the data pipeline by itself, beside the training steps that it feeds.

    python benchmarks/data_pipeline.py                                   # digits, on the CPU
    python benchmarks/data_pipeline.py --datasets uoft-cs/cifar10        # any data sets of recipes/prune.py
    python benchmarks/data_pipeline.py --device cuda                     # writes results/data_pipeline-cuda.json

For each data set: seconds of the first load (read, decode, cache, statistics; into an empty cache) and of the second;
then, in turns, the loader that `MRPFTrainer` builds (without workers, which is the recipes' default, and with two), the
same rows fetched one by one, making pixels of bytes and augmenting them, and steps of `standard` and of TRADES from
augmentation to the optimizer. "loader / step" is how many times more images the default loader gives than a step takes.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import disable_progress_bars
from side_by_side import clock_of, interleaved, report, table
from torch.utils.data import DataLoader
from trades_step import network

from hf_mrpf import MRPFConfig, MRPFTrainer
from hf_mrpf.augmentation import augment
from hf_mrpf.data import ImageData, load_image_data
from hf_mrpf.loader import as_float, collate_pixels

BATCH, LOADED = 128, 100  # images in a batch of the loader, and batches of a round
NETWORKS = ("narrow", "resnet18")


def trainer_of(name: str, objective: str, data: ImageData, device: torch.device, workers: int = 0) -> MRPFTrainer:
    """As the recipes make it."""
    model = network(name, image_size=data.image_size, num_labels=len(data.class_names))
    args = MRPFConfig(
        tempfile.gettempdir(), objective=objective, use_cpu=device.type == "cpu", report_to="none",
        per_device_train_batch_size=BATCH, dataloader_num_workers=workers,
    )  # fmt: skip
    return MRPFTrainer(model.to(device), args, train_dataset=data.train)


def read(loader: DataLoader) -> Callable[[], None]:
    """A round of batches, from the start of an epoch."""

    def run() -> None:
        for _ in itertools.islice(loader, LOADED):
            pass

    return run


def step(trainer: MRPFTrainer, size: int) -> Callable[[], None]:
    """A training step of `size` images, the same ones each time."""
    batch = {name: tensor[:size] for name, tensor in next(iter(trainer.get_train_dataloader())).items()}
    model, optimizer = trainer.model.train(), trainer.create_optimizer()

    def run() -> None:
        trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def measured(name: str, device: torch.device, sizes: dict[str, int], rounds: int) -> list[dict[str, Any]]:
    """The rows of one data set."""
    loads: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for run in ("first load", "second load"):
            cpu, wall = time.process_time(), time.perf_counter()
            data = load_image_data(name, cache_dir=cache)
            loads[run] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        first = trainer_of("narrow", "standard", data, device)
        loader, batch = first.get_train_dataloader(), next(iter(first.get_train_dataloader()))
        by_rows = DataLoader(data.train, BATCH, shuffle=True, collate_fn=collate_pixels)
        images, pixels = len(batch["labels"]), as_float(batch["pixel_values"])
        loaded = min(LOADED * BATCH, len(data.train))
        ways: dict[str, tuple[int, Callable[[], Any]]] = {
            "loader": (loaded, read(loader)),
            "loader, 2 workers": (
                loaded,
                read(trainer_of("narrow", "standard", data, device, workers=2).get_train_dataloader()),
            ),
            "rows one by one": (loaded, read(by_rows)),
            "bytes to pixels": (images, lambda: as_float(batch["pixel_values"])),
            "augmentation": (images, lambda: augment(pixels, flip=first.horizontal_flip)),
        }
        for net, objective in itertools.product(NETWORKS, ("standard", "trades")):
            trainer = trainer_of(net, objective, data, device)
            ways[f"{objective}, {net}"] = (sizes[net], step(trainer, sizes[net]))
        seconds = interleaved({way: run for way, (_, run) in ways.items()}, rounds, device)
    about = {"dataset": Path(name).name, "image_size": data.image_size, "training_images": len(data.train)}
    rows = [{**about, "way": run, "images": sum(map(len, (data.train, data.validation, data.test))), "seconds": took}
            for run, took in loads.items()]  # fmt: skip
    for way, (count, _) in ways.items():
        # The processor time of workers is not this process's.
        clock = "wall" if "workers" in way else clock_of(device)
        rows.append({**about, "way": way, "images": count, "clock": clock, "seconds": seconds[way]})
        rows[-1]["images_per_second"] = count / median(seconds[way][clock])
        if way.startswith(("standard", "trades")):
            pairs = zip(seconds[way][clock], seconds["loader"][clock], strict=True)
            rows[-1]["loader_over_step"] = median((a / count) / (b / loaded) for a, b in pairs)
    return rows


def shown(row: dict[str, Any]) -> list[Any]:
    """A line of the table."""
    if "images_per_second" not in row:
        return [row["dataset"], row["way"], row["images"], row["seconds"]["wall"], None, None]
    faster = row.get("loader_over_step")
    return [row["dataset"], row["way"], row["images"], None, round(row["images_per_second"]), faster and round(faster)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=["digits"], help="Each as --dataset_name of recipes/prune.py.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="Threads that compute on the CPU.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_sizes", type=int, nargs=2, default=None, help="Of the narrow net and of ResNet-18.")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    disable_progress_bars()
    sizes = dict(zip(NETWORKS, args.batch_sizes or ((32, 8) if device.type == "cpu" else (BATCH, BATCH)), strict=True))
    rows = [row for name in args.datasets for row in measured(name, device, sizes, args.rounds)]
    report("data_pipeline", device, args.threads, rows)
    heads = ["data set", "what", "images", "seconds", "images/s", "loader / step"]
    print(table(heads, [shown(row) for row in rows]))


if __name__ == "__main__":
    main()
