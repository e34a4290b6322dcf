"""
Robust accuracy after training against attacks in bfloat16 and in float32, seed by seed.

    python benchmarks/attack_dtype.py                            # on the digits that scikit-learn ships
    python benchmarks/attack_dtype.py --dataset FOLDER_OR_ID     # such as CIFAR-10

The narrow ResNet of the recipes is trained by TRADES from the same weights, in the same order of images, with the
training attack in either dtype. Both are then attacked by PGD-20 in float32, on the same test images with the same
random starts. The difference is shown with its standard error over seeds. Writes benchmarks/results/attack_dtype.json;
no time is measured.
"""

import argparse
import tempfile
from statistics import fmean, stdev
from typing import Any

import torch
from side_by_side import report, table

from hf_mrpf import MRPFConfig, MRPFTrainer, PrunedForImageClassification, evaluate_robustness, load_image_data
from hf_mrpf.attacks import DTYPES
from hf_mrpf.recipe_options import NARROW_RESNET


def robust_accuracy(data: Any, dtype: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Clean and PGD-20 accuracy of a network trained against attacks in that dtype."""
    torch.manual_seed(seed)
    size = data.train[0]["pixel_values"].shape[-1]
    model = PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=len(data.class_names), image_size=size, small_images=True, **NARROW_RESNET
    )
    with tempfile.TemporaryDirectory() as folder:
        config = MRPFConfig(
            folder, attack_dtype=dtype, eps=args.eps, learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size, num_train_epochs=args.epochs,
            num_steps=args.num_steps, seed=seed,
            save_strategy="no", report_to="none", use_cpu=args.device == "cpu", log_level="error", disable_tqdm=True,
        )  # fmt: skip
        MRPFTrainer(model, config, data.train).train()
        found = evaluate_robustness(model, data.test, attack=config.attack)
    return {"clean": found.clean_accuracy, "pgd20": found.attacks["pgd20"]}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="As of recipes/prune.py.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--learning_rate", type=float, default=0.2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--eps", type=float, default=0.2, help="In pixels from 0 to 1; 8/255 is 0.0314.")
    parser.add_argument("--train_images", type=int, default=1000)
    parser.add_argument("--test_images", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load_image_data(args.dataset, max_train_samples=args.train_images, max_eval_samples=args.test_images)
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for dtype in DTYPES:
            rows.append({"seed": seed, "attack_dtype": dtype, **robust_accuracy(data, dtype, seed, args)})
            print(rows[-1], flush=True)
    differences = {}
    for figure in ("clean", "pgd20"):
        single, half = ([row[figure] for row in rows if row["attack_dtype"] == dtype] for dtype in DTYPES)
        by_seed = [b - a for a, b in zip(single, half, strict=True)]
        error = stdev(by_seed) / len(by_seed) ** 0.5 if len(by_seed) > 1 else None
        differences[figure] = {"bfloat16_minus_float32": fmean(by_seed), "standard_error": error}
    more = {"differences": differences, "test_images": len(data.test), "train_images": len(data.train)}
    report("attack_dtype", torch.device(args.device), args.threads, rows, **more)
    print(table(["seed", "attack dtype", "clean", "pgd20"], [list(row.values()) for row in rows]))
    print(differences)


if __name__ == "__main__":
    main()
