"""Saved models in a fresh process: bit-equal logits through AutoModel, `pipeline` and the code in the folder."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from test_modeling import NARROW, TINY_RESNET, from_backbone, randomise, shrink_block
from transformers import AutoImageProcessor, ResNetConfig

from hf_mrpf.modeling import PrunedForImageClassification

SCRIPT = """
import sys
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

torch.set_num_threads(1)
folders = sys.argv[1:]

def check(folder, model):
    expected = load_file(f"{folder}/expected.st")
    with torch.no_grad():
        assert torch.equal(model(expected["images"]).logits, expected["logits"]), folder

for folder in folders:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    check(folder, model)
assert not [name for name in sys.modules if name.startswith("hf_mrpf")]

import hf_mrpf.modeling

for folder in folders:
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model) is hf_mrpf.modeling.PrunedForImageClassification, type(model)
    check(folder, model)
    classify = pipeline("image-classification", model=folder, device="cpu", top_k=1000)
    found = {entry["label"]: entry["score"] for entry in classify(Image.open(f"{folder}/image.png"))}
    expected = load_file(f"{folder}/expected.st")["scores"].tolist()
    names = classify.model.config.id2label
    assert [found[names[index]] for index in range(len(expected))] == expected, folder
print("all equal:", len(folders))
"""


def save(model: PrunedForImageClassification, folder: Path) -> None:
    size = model.config.image_size
    model.eval().save_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size + 5, size + 9, 3), dtype=np.uint8))
    image.save(folder / "image.png")
    pixels = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, size, size) and pixels.min() >= 0 and pixels.max() <= 1
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        logits, seen = model(images).logits, model(pixels).logits[0].numpy()
    exponents = np.exp(seen - seen.max())  # as the pipeline does, so that scores are comparable bit for bit
    scores = torch.from_numpy(exponents / exponents.sum())
    save_file({"images": images, "logits": logits, "scores": scores}, folder / "expected.st")


def test_saved_models_are_bit_equal_in_a_fresh_process(tmp_path):
    labels = {index: f"class {index}" for index in range(5)}
    dense = randomise(
        from_backbone(
            "timm/resnet18", id2label=labels, image_size=16, small_images=True, image_mean=[0.4, 0.5, 0.6], **NARROW
        )
    )
    save(dense, tmp_path / "dense")
    once = PrunedForImageClassification.from_pretrained(tmp_path / "dense")
    shrink_block(once.backbone.layer2[0], 20)
    save(once, tmp_path / "once")
    twice = PrunedForImageClassification.from_pretrained(tmp_path / "once")
    shrink_block(twice.backbone.layer2[0], 9)
    shrink_block(twice.backbone.layer3[0], 33)
    save(twice, tmp_path / "twice")
    resnet = from_backbone(ResNetConfig(**TINY_RESNET), id2label=labels, image_size=16, small_images=True)
    save(randomise(resnet), tmp_path / "transformers")

    folders = [str(tmp_path / name) for name in ("dense", "once", "twice", "transformers")]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("all equal: 4")
