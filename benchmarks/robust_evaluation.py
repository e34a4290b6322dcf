"""
Robust accuracy: `evaluate_robustness` beside torchattacks, under PGD-20 and under the standard set of AutoAttack.

    python benchmarks/robust_evaluation.py                            # on the digits that scikit-learn ships
    python benchmarks/robust_evaluation.py --dataset FOLDER_OR_ID --base narrow_vgg    # such as CIFAR-10

A narrow ResNet is trained first, by PGD adversarial training, unless a trained network is named, so that some images
are misclassified, some are fooled and some withstand, as in what is evaluated in practice. Both evaluations then run in
turns over the same test images, with random starts of their own; the ratio is of processor time on the CPU. PGD-20 is
beside `torchattacks.PGD` with the same eps, step and steps. AutoAttack is `torchattacks.MultiAttack` of its APGD,
APGDT, FAB and Square with the published settings (100 steps, 9 targets, 5000 queries), batch by batch; beside it stand
the library's own four parts run apart on every image that is right, and `autoattack`, whose verdicts must be the union
of theirs. Writes benchmarks/results/robust_evaluation.json.
"""

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import study_networks
import torch
import torchattacks
from side_by_side import clock_of, interleaved, ratio, report, table
from torch import nn
from trades_step import Logits

from hf_mrpf import (
    AttackConfig,
    PrunedForImageClassification,
    evaluate_robustness,
    load_image_data,
)
from hf_mrpf.attacks import logits_of
from hf_mrpf.data import as_pixel_dataset

TARGET, AUTOATTACK_TARGET = 4.0, 1.25
PARTS = ("apgd_ce", "apgd_t", "fab_t", "square")


def trained(data: Any, attack: AttackConfig, epochs: int, device: torch.device) -> PrunedForImageClassification:
    """A narrow ResNet after `epochs` of PGD adversarial training."""
    size = data.train[0]["pixel_values"].shape[-1] if "pixel_values" in data.train.column_names else None
    torch.manual_seed(0)
    model = PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=size or 32, small_images=True,
        layers=(1, 1, 1, 1), channels=(16, 32, 64, 64),
    )  # fmt: skip
    settings: dict[str, Any] = {"objective": "pgd", "eps": attack.eps, "num_train_epochs": epochs, "seed": 42}
    settings["use_cpu"] = device.type == "cpu"
    return study_networks.trained(model, data.train, **settings).to(device)


def by_torchattacks(model: nn.Module, images: Any, labels: Any, attack: AttackConfig, batch_size: int) -> float:
    """Fraction of the images that withstand the last iterate of `torchattacks.PGD`."""
    # An attack puts the mode back that it has found: of a fresh wrapper that would be training.
    pgd = torchattacks.PGD(Logits(model).eval(), eps=attack.eps, alpha=attack.step, steps=attack.num_steps)
    right = 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        adversarial = pgd(x, y)
        with torch.no_grad():
            right += int((logits_of(model(adversarial)).argmax(1) == y).sum())
    return right / len(images)


def autoattack_by_torchattacks(
    model: nn.Module, images: Any, labels: Any, attack: AttackConfig, batch_size: int
) -> float:
    """Fraction that withstands the standard set made of torchattacks' parts, one after another on every batch."""
    logits = Logits(model).eval()
    same: dict[str, Any] = {"norm": {"linf": "Linf", "l2": "L2"}[attack.norm], "eps": attack.eps, "seed": 0}
    parts = [
        torchattacks.APGD(logits, steps=100, **same),
        torchattacks.APGDT(logits, steps=100, n_classes=10, **same),
        torchattacks.FAB(logits, steps=100, n_classes=10, multi_targeted=True, n_restarts=1, **same),
        # The published set does not stretch the schedule of its 10,000 queries.
        torchattacks.Square(logits, n_queries=5000, resc_schedule=False, **same),
    ]
    together = torchattacks.MultiAttack(parts)
    right = 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        adversarial = together(x, y)
        with torch.no_grad():
            right += int((logits_of(model(adversarial)).argmax(1) == y).sum())
    return right / len(images)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="As of recipes/prune.py.")
    parser.add_argument("--base", help="A network of study_networks.py that has been made, instead of training one.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train_images", type=int, default=10_000)
    parser.add_argument("--test_images", type=int, default=500)
    parser.add_argument("--autoattack_images", type=int, default=100)
    parser.add_argument("--autoattack_batch_size", type=int, default=25)
    parser.add_argument("--autoattack_rounds", type=int, default=2)
    parser.add_argument("--eps", type=float, default=8 / 255)
    parser.add_argument("--batch_size", type=int, default=128)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    data = load_image_data(args.dataset, max_train_samples=args.train_images, max_eval_samples=args.test_images)
    attack = AttackConfig(eps=args.eps, num_steps=20)
    model = study_networks.base(args.base).to(device) if args.base else trained(data, attack, args.epochs, device)
    size = getattr(getattr(model, "config", None), "image_size", None)
    pixels = as_pixel_dataset(data.test, size)[:]
    # Data sets keep bytes.
    images, labels = pixels["pixel_values"].to(device).float() / 255, torch.as_tensor(pixels["labels"]).to(device)
    found: dict[str, float] = {}

    def ours() -> None:
        measured = evaluate_robustness(model, (images, labels), ["pgd20"], attack, batch_size=args.batch_size)
        found["clean"], found["hf_mrpf"] = measured.clean_accuracy, measured.attacks["pgd20"]

    def theirs() -> None:
        torch.manual_seed(0)
        found["torchattacks"] = by_torchattacks(model, images, labels, attack, args.batch_size)

    seconds = interleaved({"torchattacks": theirs, "hf_mrpf": ours}, args.rounds, device)
    clock = clock_of(device)
    rows = [
        {
            "way": way,
            "robust_accuracy": found[way],
            "faster": ratio(seconds, way, "torchattacks", clock),
            "target": TARGET if way == "hf_mrpf" else None,
            "seconds": seconds[way],
        }
        for way in seconds
    ]
    print(f"{len(images)} test images of {Path(args.dataset).name}, clean accuracy {found['clean']:.3f}")
    shown = [
        [
            row["way"],
            f"{row['robust_accuracy']:.3f}",
            median(row["seconds"][clock]),
            row["faster"],
            row["target"] or "-",
        ]
        for row in rows
    ]
    print(table(["PGD-20", "robust accuracy", "seconds", "faster", "target"], shown), flush=True)
    few = images[: args.autoattack_images], labels[: args.autoattack_images]
    size, verdicts = args.autoattack_batch_size, {}

    def apart() -> None:
        every = [evaluate_robustness(model, few, [part], attack, batch_size=size).verdicts[part] for part in PARTS]
        verdicts["parts"] = [all(bits) for bits in zip(*every, strict=True)]
        found["parts apart"] = sum(verdicts["parts"]) / len(few[1])

    def pooled() -> None:
        measured = evaluate_robustness(model, few, ["autoattack"], attack, batch_size=size)
        verdicts["pooled"] = measured.verdicts["autoattack"]
        found["autoattack"] = measured.attacks["autoattack"]

    def multi() -> None:
        found["MultiAttack"] = autoattack_by_torchattacks(model, *few, attack, size)

    ways = {"MultiAttack": multi, "parts apart": apart, "autoattack": pooled}
    auto_seconds = interleaved(ways, args.autoattack_rounds, device, warm=False)
    auto_rows = [
        {
            "way": way,
            "robust_accuracy": found[way],
            "faster": ratio(auto_seconds, way, "MultiAttack", clock),
            "faster_than_parts_apart": ratio(auto_seconds, way, "parts apart", clock),
            "target": AUTOATTACK_TARGET if way == "autoattack" else None,
            "seconds": auto_seconds[way],
        }
        for way in ways
    ]
    settings = {"images": len(images), "clean_accuracy": found["clean"], "attack": attack.describe()}
    settings["autoattack"] = {
        "images": len(few[1]),
        "batch_size": size,
        "equal_verdicts": verdicts["parts"] == verdicts["pooled"],
        "rows": auto_rows,
    }
    report("robust_evaluation", device, args.threads, rows, dataset=Path(args.dataset).name, **settings)
    print(
        f"AutoAttack, {len(few[1])} images; verdicts of the parts and of the whole are equal: "
        f"{settings['autoattack']['equal_verdicts']}"
    )
    shown = [
        [
            row["way"],
            f"{row['robust_accuracy']:.3f}",
            median(row["seconds"][clock]),
            row["faster"],
            row["faster_than_parts_apart"],
        ]
        for row in auto_rows
    ]
    print(table(["AutoAttack", "robust accuracy", "seconds", "faster", "than the parts apart"], shown))
    print(f"The target is {AUTOATTACK_TARGET} times faster than MultiAttack: parts one after another on every batch.")


if __name__ == "__main__":
    main()
