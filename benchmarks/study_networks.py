"""
The small robust networks that the study of allocations prunes: each made by one seeded command, and kept.

    python benchmarks/study_networks.py --network narrow_vgg --dataset FOLDER_OR_ID    # such as CIFAR-10

Writes benchmarks/bases/<network>.safetensors and, beside it, what it was trained by and how it does on the validation
images that the study selects on. Those, and the test images, are never trained on.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from side_by_side import report
from torch import Tensor, nn

from hf_mrpf import (
    AttackConfig,
    MRPFConfig,
    MRPFTrainer,
    PrunedForImageClassification,
    evaluate_robustness,
    load_image_data,
)
from hf_mrpf.efficiency import count_macs, count_parameters

BASES = Path(__file__).parent / "bases"
SEED = 0
EPS = 8 / 255
# Of the images that are neither trained on nor tested on; the loader sets 1,000 of them aside, the rest is cut here.
VALIDATION = 2000


class Normalised(nn.Sequential):
    """A network of pixels in [0, 1]: they are spread to about [-2, 2] first."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[N, classes]` of images `[N, 3, H, W]` in [0, 1]."""
        return super().forward((images - 0.5) * 4)


def narrow_vgg() -> nn.Module:
    """Six convolutions of 16 to 128 channels, wide at its end as VGG-16 is: 8.7 M MACs, 284 k parameters."""
    layers: list[nn.Module] = []
    inputs = 3
    for width, pool in ((16, True), (32, True), (64, False), (64, True), (128, False), (128, True)):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if pool else []
        inputs = width
    return Normalised(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def mobilenet() -> nn.Module:
    """timm's MobileNetV2 0.35 with strides up to 8 in all: 6.5 M MACs, 409 k parameters, very unequal prices."""
    return Normalised(timm.create_model("mobilenetv2_035", num_classes=10, output_stride=8))


def mobilenet_longer() -> nn.Module:
    """The trained MobileNet, to be trained on by a second schedule."""
    return base("mobilenet")


def mobilevit() -> nn.Module:
    """timm's MobileViT-xxs with strides up to 8 in all: 16.0 M MACs, 954 k parameters, convolutions and attention."""
    return Normalised(timm.create_model("mobilevit_xxs", num_classes=10, output_stride=8))


def narrow_resnet() -> nn.Module:
    """A ResNet of four blocks, 16 to 64 channels: 23.2 M MACs; for the ranks of sensitivity.py."""
    form: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (16, 32, 64, 64), "zero_init_last": False}
    network = PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=32, small_images=True, **form
    )
    return Normalised(network.backbone)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "narrow_vgg": narrow_vgg,
    "mobilenet": mobilenet,
    "mobilenet_longer": mobilenet_longer,
    "mobilevit": mobilevit,
    "narrow_resnet": narrow_resnet,
}


def splits(dataset: str) -> tuple[Dataset, Dataset, Dataset]:
    """Training, validation (2,000) and test images."""
    data = load_image_data(dataset, seed=0)
    cut = len(data.train) - (VALIDATION - len(data.validation))
    validation = concatenate_datasets([data.validation, data.train.select(range(cut, len(data.train)))])
    return data.train.select(range(cut)), validation, data.test


def base(name: str) -> nn.Module:
    """
    The trained network of that name, in eval mode.

    Raises:
        ValueError: where it has not been made yet.
    """
    file = BASES / f"{name}.safetensors"
    if not file.is_file():
        raise ValueError(f"{file.name} is not there: make it by python benchmarks/study_networks.py --network {name}.")
    model = NETWORKS[name]()
    model.load_state_dict(load_file(file))
    return model.eval()


def trained(model: nn.Module, train: Dataset, teacher: nn.Module | None = None, **options: Any) -> nn.Module:
    """`model` after adversarial training with settings that all of the study share; in place."""
    shared: dict[str, Any] = {
        "eps": EPS, "num_steps": 3, "save_strategy": "no", "eval_strategy": "no", "report_to": "none",
        "use_cpu": True, "log_level": "error", "disable_tqdm": True, "logging_strategy": "no", "seed": SEED,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = MRPFTrainer(model, MRPFConfig(folder, **(shared | options)), train, teacher=teacher)
        trainer.train()
    return trainer.model.eval()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--dataset", default="uoft-cs/cifar10")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--learning_rate", type=float, default=0.1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, validation, _ = splits(args.dataset)
    torch.manual_seed(SEED)
    start, model = time.perf_counter(), NETWORKS[args.network]()
    settings = {"objective": "pgd", "num_train_epochs": args.epochs, "learning_rate": args.learning_rate}
    model = trained(model, train, **settings)
    seconds = time.perf_counter() - start
    found = evaluate_robustness(model, validation, ["clean", "pgd20"], AttackConfig(eps=EPS, num_steps=20))
    BASES.mkdir(exist_ok=True)
    save_file(model.state_dict(), BASES / f"{args.network}.safetensors")
    example = torch.zeros(1, 3, 32, 32)
    report(
        f"base_{args.network}", torch.device("cpu"), 1, [], dataset=Path(args.dataset).name, seconds=round(seconds),
        settings=settings | {"eps": EPS, "num_steps": 3, "seed": SEED, "train_images": len(train)},
        macs=count_macs(model, example), parameters=count_parameters(model),
        validation={"images": found.num_samples, "clean": found.clean_accuracy, "pgd20": found.attacks["pgd20"]},
    )  # fmt: skip
    print(json.dumps({"seconds": round(seconds), "clean": found.clean_accuracy, "pgd20": found.attacks["pgd20"]}))


if __name__ == "__main__":
    main()
