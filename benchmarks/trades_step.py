"""
A training step of TRADES with ten inner steps, beside the published loop and one built on torchattacks.

    python benchmarks/trades_step.py                 # on the CPU; writes benchmarks/results/trades_step.json
    python benchmarks/trades_step.py --device cuda   # writes benchmarks/results/trades_step-cuda.json

Each way makes the same step (forward, attack, backward) on the same images; rounds take turns and the first is not
counted. "reference" is the loop of the published script, written again from Alg. 1 of arXiv 1901.08573: it computes the
clean softmax at each inner step. "torchattacks" takes its adversarial images from `torchattacks.TPGD`. Forwards and
backwards are counted by hooks, over a batch; a backward to the weights too is counted by itself.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import torchattacks
from side_by_side import clock_of, interleaved, ratio, report, table
from torch import Tensor, nn

from hf_mrpf import AttackConfig, PrunedForImageClassification
from hf_mrpf.attacks import DTYPES, logits_of
from hf_mrpf.efficiency import has_bfloat16
from hf_mrpf.objectives import trades

EPS, STEP, STEPS, BETA = 8 / 255, 2 / 255, 10, 6.0
# Times faster than the reference loop, by network and device, at the same values.
TARGETS = {("narrow", "cpu"): 1.6, ("resnet18", "cpu"): 1.35, ("narrow", "cuda"): 1.5, ("resnet18", "cuda"): 1.5}
HALF_TARGETS = {("narrow", "cpu"): 2.6, ("resnet18", "cpu"): 2.1, ("narrow", "cuda"): 3.0, ("resnet18", "cuda"): 3.0}


def network(name: str, image_size: int = 32, num_labels: int = 10) -> PrunedForImageClassification:
    """ResNet-18 in its form for CIFAR, or the same with a block of 16, 32, 64 and 64 channels a stage."""
    narrow: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 64)} if name == "narrow" else {}
    return PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=num_labels, image_size=image_size, small_images=True, **narrow
    )


def published(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of one step, as the published script computes it."""
    divergence = nn.KLDivLoss(reduction="sum")
    model.eval()
    adversarial = images.detach() + 0.001 * torch.randn_like(images)
    for _ in range(STEPS):
        adversarial.requires_grad_()
        with torch.enable_grad():
            inner = divergence(
                F.log_softmax(logits_of(model(adversarial)), dim=1), F.softmax(logits_of(model(images)), dim=1)
            )
        gradient = torch.autograd.grad(inner, [adversarial])[0]
        adversarial = adversarial.detach() + STEP * torch.sign(gradient.detach())
        adversarial = torch.min(torch.max(adversarial, images - EPS), images + EPS).clamp(0, 1)
    model.train()
    return outer(model, images, adversarial, labels, again=True)


def by_torchattacks(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of one step, with the images of `torchattacks.TPGD`."""
    plain = Logits(model)
    adversarial = torchattacks.TPGD(plain, eps=EPS, alpha=STEP, steps=STEPS)(images, labels)
    return outer(model.train(), images, adversarial, labels, again=False)


class Logits(nn.Module):
    """torchattacks wants a module that returns a tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images))


def outer(model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor, *, again: bool) -> Tensor:
    """`CE + beta * KL`; the published script runs the clean images twice."""
    logits = logits_of(model(images))
    clean = logits_of(model(images)) if again else logits
    robust = F.kl_div(F.log_softmax(logits_of(model(adversarial)), 1), F.softmax(clean, 1), reduction="sum")
    return F.cross_entropy(logits, labels) + BETA * robust / len(images)


def ways(model: nn.Module, images: Tensor, labels: Tensor, half: bool) -> dict[str, Callable[[], None]]:
    """A step each, with its backward pass."""

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.manual_seed(0)
            model.zero_grad()
            model.train()
            loss().backward()

        return run

    def ours(dtype: str) -> Callable[[], Tensor]:
        attack = AttackConfig("linf", EPS, STEP, STEPS, dtype=dtype)
        return lambda: trades(model, images, labels, attack, beta=BETA).loss

    def in_half() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            return ours("bfloat16")()

    every = {
        "reference": step(lambda: published(model, images, labels)),
        "torchattacks": step(lambda: by_torchattacks(model, images, labels)),
        "hf_mrpf": step(ours("float32")),
    }
    if half:
        every |= {"hf_mrpf --attack_dtype bfloat16": step(ours(DTYPES[1])), "hf_mrpf --bf16": step(in_half)}
    return every


def passes(model: nn.Module, way: Callable[[], None]) -> dict[str, int]:
    """Forwards and backwards of a whole batch in one step."""
    counts = {"forwards": 0, "backwards": 0}

    def forward(module: nn.Module, inputs: tuple, output: Any) -> None:
        counts["forwards"] += 1
        logits = logits_of(output)
        if logits.requires_grad:
            logits.register_hook(backward)

    def backward(gradient: Tensor) -> None:
        counts["backwards"] += 1

    handle = model.register_forward_hook(forward)
    way()
    handle.remove()
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="Threads that compute on the CPU.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_sizes", type=int, nargs=2, default=None, help="Of the narrow net and of ResNet-18.")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    # Both sides in full single precision.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # A processor without instructions for bfloat16 computes it many times slower: there is nothing to gain or to time.
    half = device.type == "cuda" or has_bfloat16()
    sizes = args.batch_sizes or ((128, 32) if device.type == "cpu" else (512, 512))
    rows: list[dict[str, Any]] = []
    for name, size in zip(("narrow", "resnet18"), sizes, strict=True):
        torch.manual_seed(0)
        model = network(name).to(device)
        images, labels = torch.rand(size, 3, 32, 32, device=device), torch.randint(0, 10, (size,), device=device)
        every = ways(model, images, labels, half)
        seconds = interleaved(every, args.rounds, device)
        for way, run in every.items():
            target = None
            if way.startswith("hf_mrpf"):
                target = (TARGETS if way == "hf_mrpf" else HALF_TARGETS)[name, device.type]
            row: dict[str, Any] = {"network": name, "batch": size, "way": way, **passes(model, run)}
            row |= {"faster": ratio(seconds, way, "reference", clock_of(device)), "target": target}
            row |= {"faster_wall": ratio(seconds, way, "reference", "wall")}
            row |= {"seconds": seconds[way]}
            rows.append(row)
    report("trades_step", device, args.threads, rows, bfloat16_timed=half)
    shown = [
        [row["network"], row["batch"], row["way"], row["forwards"], row["backwards"],
         median(row["seconds"][clock_of(device)]), row["faster"], row["faster_wall"], row["target"]]
        for row in rows
    ]  # fmt: skip
    print(table(["network", "batch", "step", "forwards", "backwards", "seconds", "faster", "wall", "target"], shown))
    if not half:
        print("bfloat16 was not timed: this processor has no instructions for it.")


if __name__ == "__main__":
    main()
