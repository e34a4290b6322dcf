"""
ResNet-18 and MobileViT-xs on CIFAR-10, pruned to several targets by several allocations, under AutoAttack; on a GPU.

    python benchmarks/gpu_cifar10.py --dataset FOLDER --work FOLDER --list
    python benchmarks/gpu_cifar10.py --dataset FOLDER --work FOLDER --minutes 8.5    # again, until all is done

A call does as much as its minutes allow and ends by itself; the next one goes on from there, inside a training from its
last checkpoint. What is finished is a line of `results/gpu_cifar10.jsonl`. What an interrupted cell needs lies in
`--scratch`, which may be lost: that cell then starts again. The dense models lie in `--work`, in files of at most 15
MB, and must be kept. Nothing is downloaded: `--dataset` is a folder in the schema of `uoft-cs/cifar10`.

Each dense model is trained by TRADES once, with seed 0; the seed of a cell is that of its calibration sets, fine-
tuning and training attacks. Of every training the last epoch counts, so that no image is chosen by, and all are
measured on the same test images. `--dataset digits` goes the same way with toy networks, on a CPU too, to try this
script: its figures mean nothing and go to `--work`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from side_by_side import RESULTS, own_command, table

from hf_mrpf import PrunedForImageClassification, RobustnessReport
from hf_mrpf.cli import number
from hf_mrpf.console import quieten
from hf_mrpf.efficiency import device_name
from hf_mrpf.measured_allocation import known_allocations

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
RESNET, MOBILEVIT = "resnet18", "mobilevit_xs"
NETWORKS = {
    RESNET: ["--model_name_or_path", "timm/resnet18", "--small_images"],
    MOBILEVIT: ["--model_name_or_path", "timm/mobilevit_xs", "--small_images"],
}
TOYS: dict[str, list[str]] = {
    RESNET: [],
    MOBILEVIT: [
        *("--model_name_or_path", "timm/mobilevit_xxs", "--small_images", "--image_size", "32"),
        *("--backbone_kwargs", '{"width_factor": 0.5, "stem_chs": 8}'),
    ],
}
# Network, metric and fraction kept, in the order of their weight; the first is the primary cell.
TARGETS = [
    (RESNET, "macs", 0.5),
    (RESNET, "macs", 0.25),
    (RESNET, "params", 0.5),
    (RESNET, "params", 0.25),
    (RESNET, "params", 0.1),
    (MOBILEVIT, "macs", 0.5),
]
ATTACKS = ("clean", "pgd20", "autoattack")
# What a process gets to write its checkpoint after SIGTERM, and the least time for which one is worth starting.
GRACE, LEAST = 40.0, 25.0


class OutOfTime(Exception):
    """The minutes of this call are over; the next one goes on."""


class Cell(NamedTuple):
    """A dense model (`metric` is None then) or one pruned and fine-tuned model."""

    network: str
    metric: str | None = None
    target: float = 1.0
    allocation: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its folder, and in the table."""
        if self.metric is None:
            return f"dense-{self.network}"
        return f"{self.network}-{self.metric}{self.target:g}-{self.allocation}-{self.seed}"


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """All of them, in order; allocations of one seed follow each other, so that pairs are whole early."""
    met = set()
    for place, (network, metric, target) in enumerate(TARGETS):
        if network not in met:
            met.add(network)
            yield Cell(network)
        for seed in range(args.seeds if place else args.primary_seeds):
            for allocation in args.allocations:
                yield Cell(network, metric, target, allocation, seed)
    # What the study of allocations favours, most where parameters are the budget.
    for network, metric, target in sorted(TARGETS, key=lambda place: place[1] != "params"):
        for seed in range(args.seeds):
            for allocation in args.then:
                yield Cell(network, metric, target, allocation, seed)


def trained_by(args: argparse.Namespace) -> dict[str, Any]:
    """What a dense model depends on."""
    names = ("dense_epochs", "eps", "num_steps", "batch_size", "max_train_samples")
    given = {name: getattr(args, name) for name in names}
    return given | {"dataset": Path(args.dataset).name, "precision": "bf16" if args.cuda else "float32"}


def settings(args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """What the figures of a cell depend on; a line with others is of another cell."""
    measured = {"num_samples": args.num_samples, "attacks": args.attacks}
    return trained_by(args) | measured | ({} if cell.metric is None else {"epochs": args.epochs})


class Clock:
    """Runs recipes until the time of this call is over."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes - GRACE

    def left(self) -> float:
        """Seconds that a process may still run."""
        return self.end - time.monotonic()

    def run(self, folder: Path, recipe: str, options: Sequence[object]) -> str:
        """
        Run a recipe to its end and give what it printed; the time is kept in `folder` over several calls.

        Raises:
            OutOfTime: if the time is over, after the process has saved where it is.
            RuntimeError: if it fails, with the end of its output.
        """
        if self.left() < LEAST:
            raise OutOfTime
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(RECIPES / recipe), *map(str, options)]
        environment = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ | {"HF_HUB_OFFLINE": "1"}
        start, log = time.monotonic(), folder / f"{recipe}.log"
        with log.open("w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                status: int | None = process.wait(self.left())
            except subprocess.TimeoutExpired:
                status = None
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(GRACE - 5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        before = seconds_of(folder)
        seconds = round(before.get(recipe, 0.0) + time.monotonic() - start, 1)
        (folder / "seconds.json").write_text(json.dumps(before | {recipe: seconds}))
        if status is None:
            raise OutOfTime
        said = log.read_text(errors="replace")
        if status:
            raise RuntimeError(f"{recipe} ended with status {status}:\n{said[-3000:]}")
        return said


def common(args: argparse.Namespace) -> list[object]:
    """Options of all three recipes."""
    return [] if args.dataset == "digits" else ["--dataset_name", args.dataset]


def training(args: argparse.Namespace, network: str, epochs: float, seed: int) -> list[object]:
    """Options of the two that train: by TRADES, whose last epoch counts, so that nothing is validated meanwhile."""
    options = [*common(args), "--num_train_epochs", epochs, "--seed", seed, "--eps", args.eps]
    options += [
        "--objective",
        "trades",
        "--num_steps",
        args.num_steps,
        "--per_device_train_batch_size",
        args.batch_size,
    ]
    options += ["--load_best_model_at_end", "False", "--eval_strategy", "no", "--max_eval_samples", args.validated]
    if network == MOBILEVIT:
        options += ["--optim", "adam"]
    if args.max_train_samples:
        options += ["--max_train_samples", args.max_train_samples]
    return [*options, *(["--bf16", "--attack_dtype", "bfloat16"] if args.cuda else ["--use_cpu"])]


def dense_model(network: str, args: argparse.Namespace) -> tuple[Path, bool]:
    """Where the dense model of a network is kept, and whether it is there; a ValueError if it is another one."""
    folder, own = args.work / f"dense-{network}", trained_by(args)
    if not (folder / "settings.json").exists():
        return folder, False
    was = json.loads((folder / "settings.json").read_text())
    if changed := ", ".join(name for name in own if own[name] != was.get(name)):
        raise ValueError(f"{folder} was trained with other settings ({changed}); give another --work, or those.")
    return folder, True


def made(cell: Cell, clock: Clock, args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Train the dense model, or prune and fine-tune; the folder of the model, and what pruning left of its size."""
    folder, (dense, there) = args.scratch / cell.name, dense_model(cell.network, args)
    if cell.metric is None:
        if not there:
            model = (TOYS if args.toy else NETWORKS)[cell.network]
            options = [*training(args, cell.network, args.dense_epochs, 0), *model, "--output_dir", folder / "run"]
            clock.run(folder, "train.py", options)
            keep(folder, dense, trained_by(args))
        return dense, {}
    if not there:
        raise ValueError(f"{dense} is not there, and cells of {cell.network} are pruned from it; keep --work.")
    options = [*training(args, cell.network, args.epochs, cell.seed), "--model_name_or_path", dense]
    options += ["--target", cell.target, "--target_metric", cell.metric, "--allocation", cell.allocation]
    clock.run(folder, "prune.py", [*options, "--output_dir", folder / "run"])
    plan = json.loads((folder / "run" / "pruning_plan.json").read_text())
    return folder / "run", {name: plan[name] for name in ("achieved", "before", "after", "ratios")}


def keep(scratch: Path, folder: Path, own: dict[str, Any]) -> None:
    """Save a dense model in small files; its settings are written last, and say that it is whole."""
    PrunedForImageClassification.from_pretrained(scratch / "run").save_pretrained(folder, max_shard_size="15MB")
    shutil.copy(scratch / "seconds.json", folder)
    (folder / "settings.json").write_text(json.dumps(own))


def seconds_of(folder: Path) -> dict[str, float]:
    """By recipe, over all calls."""
    file = folder / "seconds.json"
    return json.loads(file.read_text()) if file.exists() else {}


def finished(cell: Cell, clock: Clock, args: argparse.Namespace) -> dict[str, Any]:
    """Bring a cell to its end: its line of the result."""
    folder = args.scratch / cell.name
    model, sizes = made(cell, clock, args)
    options: list[object] = [model, *common(args), "--attacks", *args.attacks, "--num_samples", args.num_samples]
    options += ["--eps", args.eps, "--seed", 0, "--batch_size", args.eval_batch_size, "--device", args.device]
    options += ["--journal", folder / "verdicts.jsonl", "--output", folder / "report.json"]
    said = clock.run(folder, "evaluate.py", options)
    content = json.loads((folder / "report.json").read_text())
    report = RobustnessReport.from_dict(content)
    line = {"cell": cell.name, **cell._asdict(), "settings": settings(args, cell), **sizes}
    line |= {"accuracy": {name: report.accuracy(name) for name in report}}
    line |= {name: content[name] for name in ("intervals", "num_samples", "images", "verdicts", "versions")}
    line |= {"device": device_name(torch.device(args.device))}
    line |= {"attacks": content["settings"], "warnings": [row for row in said.splitlines() if "warning:" in row]}
    return line | {"seconds": seconds_of(model) | seconds_of(folder), "command": own_command()}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The finished cells."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def line_of(cell: Cell, args: argparse.Namespace) -> dict[str, Any] | None:
    """The line of a finished cell with these settings."""
    own = settings(args, cell)
    return next((line for line in lines_of(args.results) if (line["cell"], line["settings"]) == (cell.name, own)), None)


def shown(args: argparse.Namespace) -> str:
    """A table of what is done and what is left."""
    rows = []
    for cell in cells(args):
        line, started = line_of(cell, args), (args.scratch / cell.name).exists()
        figures = [100 * line["accuracy"][name] if line else None for name in args.attacks]
        rows.append([cell.name, "done" if line else "started" if started else "left", *figures])
    return table(["cell", "", *(f"{name} %" for name in args.attacks)], rows)


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder with CIFAR-10, or digits to try the script")
    parser.add_argument("--work", type=Path, required=True, help="folder for the dense models; keep it")
    parser.add_argument("--scratch", type=Path, help="folder for unfinished cells; WORK/scratch if not given")
    parser.add_argument("--results", type=Path, help="file to add lines to; benchmarks/results/gpu_cifar10.jsonl")
    parser.add_argument("--minutes", type=float, default=8.5, help="how long this call may take")
    parser.add_argument("--list", action="store_true", help="show what is done and left, and end")
    parser.add_argument("--dense_epochs", type=float, default=30, help="epochs of the dense models")
    parser.add_argument("--epochs", type=float, default=10, help="epochs of fine-tuning")
    parser.add_argument("--primary_seeds", type=int, default=5, help="seeds at 50 %% of the multiply-accumulates")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the other cells")
    parser.add_argument("--allocations", nargs="+", choices=known_allocations(), default=["mrs", "uniform"])
    parser.add_argument(
        "--then", nargs="*", choices=known_allocations(), default=["damage"], help="Those that follow at the end."
    )
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), help="what the models are measured by")
    parser.add_argument("--num_samples", type=int, default=1000, help="test images")
    parser.add_argument("--max_train_samples", type=int, help="training images; all if not given")
    parser.add_argument("--eps", type=number, help="radius; 8/255, or 0.2 of the digits, if not given")
    parser.add_argument("--num_steps", type=int, default=10, help="steps of the attack in training")
    parser.add_argument("--batch_size", type=int, default=128, help="images in a training step")
    parser.add_argument("--eval_batch_size", type=int, default=250, help="images in a batch of the evaluation")
    args = parser.parse_args()
    args.toy, args.cuda = args.dataset == "digits", torch.cuda.is_available()
    args.device = "cuda" if args.cuda else "cpu"
    args.scratch = args.scratch or args.work / "scratch"
    args.results = args.results or (args.work / "digits.jsonl" if args.toy else RESULTS / "gpu_cifar10.jsonl")
    args.eps = args.eps or (0.2 if args.toy else 8 / 255)
    # The recipes measure their stages under cheap attacks too: enough to see that nothing went wrong.
    args.validated = min(args.num_samples, 500)
    if not args.toy and not Path(args.dataset).is_dir():
        raise ValueError(f"--dataset {args.dataset} is no folder; give one with CIFAR-10, or digits.")
    if not args.toy and not args.cuda and not args.list:
        raise ValueError(
            "there is no GPU, and without one CIFAR-10 takes weeks; give --dataset digits to try the script."
        )
    return args


def main() -> None:
    """Cell after cell, while there is time."""
    args = parse_arguments()
    quieten()
    if args.list:
        print(shown(args))
        return
    clock = Clock(args.minutes)
    try:
        for cell in cells(args):
            if line_of(cell, args):
                continue
            print(f"{cell.name} ...", flush=True)
            line = finished(cell, clock, args)
            args.results.parent.mkdir(parents=True, exist_ok=True)
            with args.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            shutil.rmtree(args.scratch / cell.name)
            print(f"{cell.name}: {', '.join(f'{name} {value:.4f}' for name, value in line['accuracy'].items())}")
    except OutOfTime:
        print("the time is over; the same command goes on")
    print(shown(args))


if __name__ == "__main__":
    main()
