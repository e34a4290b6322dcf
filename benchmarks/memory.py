"""
Peak memory of training and of module robustness sensitivity (MRS), each beside the plain thing it extends.

    python benchmarks/memory.py                # on the CPU: prints a table, writes benchmarks/results/memory.json
    python benchmarks/memory.py --device cuda  # writes benchmarks/results/memory-cuda.json

Every case runs in a fresh process, over what that process holds when idle: once all is imported and a toy was trained.
Model, optimizer and data count as part of a case. Two figures are taken, in separate runs:

- `bytes`: the most bytes that tensors held at once, on the CPU summed over the allocations that PyTorch's profiler
  records. It repeats to the byte, so targets are judged by it. Scratch memory of oneDNN and whatever is no tensor are
  not in it. On a GPU it is `torch.cuda.max_memory_allocated`, which has the scratch memory of cuDNN too.
- `rss`: growth of the process's peak in memory (`VmHWM`, Linux), CPU only: `--repeats` processes, which take turns with
  those of the other cases. It holds everything, and the noise of the C library's free lists.
"""

import argparse
import contextlib
import functools
import gc
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# Before torch is imported, here and in every child: else the profiler and the allocator comment on each start.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from side_by_side import report
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, ViTConfig

from hf_mrpf import (
    AttackConfig,
    MRPFConfig,
    MRPFTrainer,
    PrunedForImageClassification,
    module_robustness_sensitivity,
    pgd_attack,
)

FIRST, LAST = 50, 300  # steps of the long run that are compared
MIB = 2**20


def resnet18() -> PrunedForImageClassification:
    """ResNet-18 of timm in its form for CIFAR."""
    return PrunedForImageClassification.from_backbone("timm/resnet18", num_labels=10, image_size=32, small_images=True)


def vit() -> PrunedForImageClassification:
    """A ViT of transformers: 64 patches, 6 layers of width 192."""
    sizes: dict[str, Any] = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
    }
    config = ViTConfig(image_size=32, patch_size=4, **sizes)
    return PrunedForImageClassification.from_backbone(config, num_labels=10, image_size=32)


def toy() -> PrunedForImageClassification:
    """A ResNet of 8 channels, quick enough for the long run."""
    sizes: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
    return PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, **sizes
    )


NETS: dict[str, Callable[[], Any]] = {"resnet18": resnet18, "vit": vit, "toy": toy}


class MarkSteps(TrainerCallback):
    """Puts the end of each step on the profiler's time line, and notes the peak so far in `peaks[step]`."""

    def __init__(self, device: str):
        self.device = device
        self.peaks: dict[int, int] = {}

    def on_step_end(self, args, state, control, **kwargs):
        with record_function(f"step {state.global_step}"):
            self.peaks[state.global_step] = highest(self.device)


# ---- What is measured ------------------------------------------------------------------------------------------------


def example_batch(size: int, image_size: int) -> tuple[Tensor, Tensor]:
    """Random images `[size, 3, image_size, image_size]` in [0, 1] and labels `[size]`."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(size, 3, image_size, image_size, generator=draw)
    return images, torch.randint(0, 10, (size,), generator=draw)


def train(
    net: str, objective: str, batch_size: int, device: str, num_steps: int = 2, max_steps: int = 2, **settings: Any
) -> dict[int, int]:
    """
    Train a new network on one batch of random images, by the plain `Trainer` where the objective is `"fine-tune"`.

    Two steps are enough for the peak: from the second one on, momentum is there during the forward.
    """
    model = NETS[net]()
    images, labels = example_batch(batch_size, model.config.image_size)
    dataset: Any = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    plain = objective == "fine-tune"
    own: dict[str, Any] = {} if plain else {"objective": objective, "num_steps": num_steps}
    with tempfile.TemporaryDirectory() as folder:
        args = (TrainingArguments if plain else MRPFConfig)(
            folder,
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            optim="sgd",
            optim_args="momentum=0.9,nesterov=true",
            learning_rate=0.01,
            max_grad_norm=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=device == "cpu",
            **own,
            **settings,
        )
        trainer = (Trainer if plain else MRPFTrainer)(model=model, args=args, train_dataset=dataset)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(marks := MarkSteps(device))
        trainer.train()
    return marks.peaks


def attack(net: str, batch_size: int, device: str, num_steps: int) -> None:
    """Run PGD on a new network."""
    model = NETS[net]().to(device)
    images, labels = example_batch(batch_size, model.config.image_size)
    pgd_attack(model, images.to(device), labels.to(device), AttackConfig(num_steps=num_steps))


def forward_backward(net: str, batch_size: int, device: str) -> None:
    """Run a new network forward and backward once, in eval mode as MRS does."""
    model = NETS[net]().to(device).eval()
    images, labels = example_batch(batch_size, model.config.image_size)
    model(images.to(device), labels=labels.to(device)).loss.backward()


def sensitivity(net: str, batch_size: int, device: str) -> None:
    """Score every module of a new network; two steps of ascent make every kind of pass that more of them make."""
    model = NETS[net]().to(device)
    batch = example_batch(batch_size, model.config.image_size)
    module_robustness_sensitivity(model, [batch], AttackConfig(num_steps=2), num_steps=2, batch_size=batch_size)


WORK: dict[str, Callable[..., Any]] = {
    "train": train,
    "attack": attack,
    "forward_backward": forward_backward,
    "sensitivity": sensitivity,
}

# ---- How it is measured ----------------------------------------------------------------------------------------------


def tensor_bytes(work: Callable[[], object]) -> tuple[int, dict[str, tuple[int, int]]]:
    """
    Count the bytes of CPU tensors that `work` has allocated and not freed yet, as it goes.

    Args:
        work (`Callable`):
            Called once, without arguments.

    Returns:
        The highest count, and for each `record_function("step ...")` within `work`, by its name, the count at its start
        and the highest one since the start of the one before.
    """
    gc.collect()  # what is garbage already must not be freed, and counted so, within
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    peak = since = count = 0
    marks = {}
    for event in profiler.profiler.kineto_results.events():  # in the order of time
        if event.name() == "[memory]":
            count += event.nbytes()
            since, peak = max(since, count), max(peak, count)
        elif event.name().startswith("step "):
            marks[event.name()] = (count, since)
            since = count
    return peak, marks


def resident(kind: str) -> int:
    """Bytes of this process in memory: now (`"VmRSS"`) or at most so far (`"VmHWM"`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def highest(device: str) -> int:
    """Peak so far in bytes: of the tensors on the GPU, else of the process."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def idle(device: str) -> int:
    """Bytes in use now; peaks count from here on."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):  # where it is forbidden, the peak of the imports remains: no lower than this one
        Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measure(case: dict[str, Any], how: str, device: str, threads: int) -> list[int]:
    """
    Run a case in this process, which must be fresh.

    Args:
        case (`dict`):
            A name in `WORK` under `"work"`, and arguments of that function.
        how (`str`):
            `"bytes"` or `"rss"`.
        device (`str`):
            `"cpu"` or `"cuda"`.
        threads (`int`):
            Threads that compute on the CPU.

    Returns:
        Peak in bytes over the idle process. Of the long run two: within step 50 and within step 300 where tensors of
        the CPU are counted, else up to the end of these steps.
    """
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)  # the flag has a new name in the newest transformers only
    train("toy", "trades", 2, device)
    arguments = {**case, "device": device}
    work = functools.partial(WORK[arguments.pop("work")], **arguments)
    steps = (FIRST, LAST) if case.get("max_steps") == LAST else ()
    if how == "bytes" and device == "cpu":
        peak, marks = tensor_bytes(work)
        return [marks[f"step {step}"][1] for step in steps] or [peak]
    before = idle(device)
    peaks = work()
    return [peaks[step] - before for step in steps] or [highest(device) - before]


def measure_apart(*arguments: Any) -> list[int]:
    """`measure` in a process of its own."""
    # Forked from one that has imported everything and computed nothing: importing takes longer than many a case.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_mrpf", "transformers.trainer", "timm"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


# ---- The table -------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A case, what it is compared with, and the ratio of their peaks that it may reach."""

    case: str
    reference: str
    target: float


COMPARISONS = (
    Comparison("standard", "fine-tune", 1.3),
    Comparison("pgd", "fine-tune", 1.3),
    Comparison("trades", "fine-tune", 2.2),
    Comparison("trades --gradient_checkpointing", "fine-tune", 1.3),
    Comparison("attack, 10 steps", "attack, 1 step", 1.01),
    Comparison("MRS", "forward and backward", 1.5),
)


def cases_of(net: str, batch_size: int, sensitivity_batch_size: int) -> dict[str, dict[str, Any]]:
    """Every case of a network, by name."""
    training = {"work": "train", "net": net, "batch_size": batch_size}
    trades = {**training, "objective": "trades"}
    attacking = {"work": "attack", "net": net, "batch_size": batch_size}
    scoring = {"net": net, "batch_size": sensitivity_batch_size}
    return {
        "fine-tune": {**training, "objective": "fine-tune"},
        "standard": {**training, "objective": "standard"},
        "pgd": {**training, "objective": "pgd"},
        "trades": trades,
        "trades --gradient_checkpointing": {**trades, "gradient_checkpointing": True},
        "attack, 1 step": {**attacking, "num_steps": 1},
        "attack, 10 steps": {**attacking, "num_steps": 10},
        "forward and backward": {"work": "forward_backward", **scoring},
        "MRS": {"work": "sensitivity", **scoring},
    }


def ratio(case: list[int], reference: list[int]) -> float | None:
    """Of the medians; None where nothing was measured."""
    return median(case) / median(reference) if case else None


def compare(net: str, sizes: tuple[int, int], repeats: int, device: str, threads: int) -> list[dict[str, Any]]:
    """Measure a network's cases, and put each beside its reference."""
    cases = cases_of(net, *sizes)
    counted = {name: measure_apart(case, "bytes", device, threads) for name, case in cases.items()}
    resident: dict[str, list[int]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            resident[name] += measure_apart(case, "rss", device, threads)
    return [
        {
            "net": net,
            "batch_size": cases[case]["batch_size"],
            "case": case,
            "reference": reference,
            "target": target,
            "bytes": {"case": counted[case], "reference": counted[reference]},
            "bytes_ratio": ratio(counted[case], counted[reference]),
            "rss": {"case": resident[case], "reference": resident[reference]},
            "rss_ratio": ratio(resident[case], resident[reference]),
        }
        for case, reference, target in COMPARISONS
    ]


def long_run(objective: str, repeats: int, device: str, threads: int) -> dict[str, Any]:
    """The peak at step 300 beside that at step 50."""
    case = {"work": "train", "net": "toy", "objective": objective, "batch_size": 64, "num_steps": 1, "max_steps": LAST}
    first, last = measure_apart(case, "bytes", device, threads)
    runs = [measure_apart(case, "rss", device, threads) for _ in range(repeats)]
    early, late = [run[0] for run in runs], [run[1] for run in runs]
    return {
        "net": "toy",
        "batch_size": case["batch_size"],
        "case": f"{objective}, step {LAST}",
        "reference": f"step {FIRST}",
        "target": 1.0,
        "bytes": {"case": [last], "reference": [first]},
        "bytes_ratio": last / first,
        "rss": {"case": late, "reference": early},
        "rss_ratio": ratio(late, early),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, in MiB."""
    lines = [
        "| network | batch | case | beside | tensors | ratio | target | process | ratio |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        pairs = []
        for how in ("bytes", "rss"):
            measured = [median(row[how][side]) / MIB for side in ("case", "reference") if row[how][side]]
            pairs.append(f"{measured[0]:.1f} / {measured[1]:.1f} | {row[f'{how}_ratio']:.2f}" if measured else "- | -")
        lines.append(
            f"| {row['net']} | {row['batch_size']} | {row['case']} | {row['reference']} | {pairs[0]} "
            f"| {row['target']:.2f} | {pairs[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="Threads that compute on the CPU.")
    parser.add_argument("--nets", nargs="*", choices=("resnet18", "vit"), default=["resnet18", "vit"])
    parser.add_argument("--batch_size", type=int, default=64, help="Of training and attack.")
    parser.add_argument("--sensitivity_batch_size", type=int, default=32, help="Of MRS, which takes longer.")
    parser.add_argument("--repeats", type=int, default=3, help="Processes per case whose resident size is measured.")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none; leave it out to measure on the CPU.")
    repeats = args.repeats if args.device == "cpu" else 0
    rows = [long_run(objective, repeats, args.device, args.threads) for objective in ("trades", "pgd")]
    for net in args.nets:
        rows += compare(net, (args.batch_size, args.sensitivity_batch_size), repeats, args.device, args.threads)
    report("memory", torch.device(args.device), args.threads, rows)
    print(table(rows))
    missed = [f"{row['net']}: {row['case']}" for row in rows if row["bytes_ratio"] > row["target"]]
    print(f"Above their targets: {', '.join(missed) or 'none'}.")


if __name__ == "__main__":
    main()
