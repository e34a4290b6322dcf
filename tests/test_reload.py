"""Saved models in a fresh process without the package: bit-equal logits through AutoModel, `pipeline`, then with it."""

import copy
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_client import REPOSITORY
from PIL import Image
from safetensors.torch import save_file
from test_modeling import NARROW, TINY_RESNET, TINY_VIT, from_backbone, randomise, shrink_block, shrink_heads
from torch import nn
from transformers import AutoImageProcessor, MobileViTConfig, ResNetConfig, SwinConfig, ViTConfig

from hf_mrpf.modeling import PrunedForImageClassification, describe_pruning

SCRIPT = """
import sys
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

torch.set_num_threads(1)
repository, *folders = sys.argv[1:]

try:
    import hf_mrpf
except ImportError:
    pass
else:
    raise SystemExit(f"this environment has {hf_mrpf.__file__}")

def check(folder, model, kind="logits"):
    expected = load_file(f"{folder}/expected.st")
    with torch.no_grad():
        assert torch.equal(model(expected["images"]).logits, expected[kind]), (folder, kind)

def check_scores(folder, **options):
    classify = pipeline("image-classification", model=folder, device="cpu", top_k=1000, **options)
    found = {entry["label"]: entry["score"] for entry in classify(Image.open(f"{folder}/image.png"))}
    expected = load_file(f"{folder}/expected.st")["scores"].tolist()
    names = classify.model.config.id2label
    assert [found[names[index]] for index in range(len(expected))] == expected, folder
    return classify.model

load = AutoModelForImageClassification.from_pretrained
for folder in folders:
    options = {"trust_remote_code": True}
    model = load(folder, **options)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    check(folder, model)
    check(folder, check_scores(folder, **options))
    if any("attn" in name or "attention" in name for name, _ in model.backbone.named_modules()):
        check(folder, load(folder, attn_implementation="eager", **options), "eager")
        check(folder, load(folder, dtype=torch.bfloat16, **options), "bfloat16")
for folder in folders[-2:]:
    check(folder, load(folder, device_map="cpu", **options))
    check(folder, load(folder, device_map="auto", **options))
assert not [name for name in sys.modules if name.startswith("hf_mrpf")]

sys.path.insert(0, repository)
import hf_mrpf.modeling

for folder in folders:
    model = load(folder)
    assert type(model) is hf_mrpf.modeling.PrunedForImageClassification, type(model)
    check(folder, model)
check_scores(folder)
print("all equal:", len(folders))
"""
LABELS = {index: f"class {index}" for index in range(5)}
SIZES = {"id2label": LABELS, "image_size": 32}
TINY_SWIN = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "patch_size": 2, "window_size": 4}
TINY_MOBILEVIT = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [4, 8, 8, 16, 16, 16, 32]}


def without_the_package(folder: Path) -> Path:
    """The interpreter of an environment that has every installed package but this one."""
    venv.create(folder, with_pip=False)
    packages = folder / "packages"
    packages.mkdir()
    for place in sys.path:
        if Path(place).name in ("site-packages", "dist-packages"):
            for entry in Path(place).iterdir():
                link = packages / entry.name
                if not entry.name.startswith(("hf_mrpf", "_editable", "__editable__")) and not link.exists():
                    link.symlink_to(entry)
    own = next((folder / "lib").glob("python*/site-packages"))
    (own / "packages.pth").write_text(f"{packages}\n")
    return folder / "bin" / "python"


def run_without_the_package(folder: Path, script: str, *arguments: str, **environment: str) -> str:
    """What the script prints."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    run = subprocess.run(
        [without_the_package(folder / "environment"), "-c", script, *arguments],
        env=kept | {"HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.strip()


def save(model: PrunedForImageClassification, folder: Path, **options: str) -> None:
    """Save a model with what it answers: as it is, with eager attention, in bfloat16, and to an image file."""
    size = model.config.image_size
    model.eval().save_pretrained(folder, **options)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size + 5, size + 9, 3), dtype=np.uint8))
    image.save(folder / "image.png")
    pixels = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, size, size) and pixels.min() >= 0 and pixels.max() <= 1
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        logits, seen = model(images).logits, model(pixels).logits[0].numpy()
        eager = eager_copy(model)(images).logits
        half = model.to(torch.bfloat16)(images).logits
    exponents = np.exp(seen - seen.max())  # as the pipeline does, so that scores are comparable bit for bit
    scores = torch.from_numpy(exponents / exponents.sum())
    expected = {"images": images, "logits": logits, "scores": scores, "eager": eager, "bfloat16": half}
    save_file(expected, folder / "expected.st")


def eager_copy(model: PrunedForImageClassification) -> PrunedForImageClassification:
    other = copy.deepcopy(model)
    for module in other.backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    if getattr(other.backbone, "_supports_sdpa", False):
        other.backbone.set_attn_implementation("eager")
    return other


def cut(layer: nn.Linear, kept: torch.Tensor, dim: int) -> None:
    """Keep these rows (dim 0) or columns (dim 1) of a linear layer."""
    layer.weight = nn.Parameter(layer.weight.detach().index_select(dim, kept))
    if dim == 0:
        layer.bias = nn.Parameter(layer.bias.detach()[kept])
    layer.out_features, layer.in_features = layer.weight.shape


def kept_rows(heads: int, old: int, width: int) -> torch.Tensor:
    return torch.arange(heads * old).view(heads, old)[:, old - width :].flatten()


def shrink_transformers(attention: nn.Module, width: int) -> None:
    """Cut the heads of a transformers ViTAttention, SwinAttention or MobileViTAttention to `width` channels."""
    if hasattr(attention, "q_proj"):
        inner, old = attention, attention.head_dim
        queries, output = (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj
        attention.head_dim, attention.scaling = width, width**-0.5
    else:
        inner = attention.attention
        old, inner.attention_head_size = inner.attention_head_size, width
        inner.all_head_size = width * inner.num_attention_heads
        queries, output = (inner.query, inner.key, inner.value), attention.output.dense
    kept = kept_rows(inner.num_attention_heads, old, width)
    for layer in queries:
        cut(layer, kept, 0)
    cut(output, kept, 1)


def shrink_window(attention: nn.Module, width: int) -> None:
    """Cut the heads of a timm WindowAttention, which knows its scale but not its width."""
    heads = attention.num_heads
    kept = kept_rows(heads, attention.proj.in_features // heads, width)
    rows = attention.qkv.out_features // 3
    cut(attention.qkv, torch.cat([kept + part * rows for part in range(3)]), 0)
    cut(attention.proj, kept, 1)
    attention.scale = width**-0.5


def drop_head(attention: nn.Module) -> None:
    """Leave out the first head of a timm WindowAttention, with its column of the position table."""
    heads, width = attention.num_heads, attention.proj.in_features // attention.num_heads
    kept = torch.arange(width, heads * width)
    cut(attention.qkv, torch.cat([kept + part * heads * width for part in range(3)]), 0)
    cut(attention.proj, kept, 1)
    table = attention.relative_position_bias_table
    attention.relative_position_bias_table = nn.Parameter(table.detach()[:, 1:].clone())
    attention.num_heads = heads - 1


def named(model: nn.Module, kind: str) -> list[nn.Module]:
    return [module for module in model.backbone.modules() if type(module).__name__ == kind]


ATTENTIONS = {
    "timm-vit": ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 24}, "Attention"),
    "timm-mobilevit": ("mobilevit_xxs", {}, "Attention"),
    "timm-swin": ("swin_tiny_patch4_window7_224", TINY_SWIN, "WindowAttention"),
    "vit": (ViTConfig(**TINY_VIT, qkv_bias=True), {}, "ViTAttention"),
    "mobilevit": (MobileViTConfig(**TINY_MOBILEVIT), {}, "MobileViTAttention"),
    "swin": (SwinConfig(**TINY_SWIN), {}, "SwinAttention"),
}


def attention_model(name: str) -> PrunedForImageClassification:
    """Pruned attention, every head narrower by hand."""
    backbone, arguments, kind = ATTENTIONS[name]
    model = randomise(from_backbone(backbone, **arguments, **SIZES))
    found = named(model, kind)
    assert found
    for index, attention in enumerate(found):
        if kind == "Attention":
            shrink_heads(attention, attention.head_dim - 3)
        elif kind != "WindowAttention":
            shrink_transformers(attention, 3)
        elif index == 2:
            drop_head(attention)
        else:
            shrink_window(attention, 3)
    assert describe_pruning(model)["attrs"]
    return model


RESNETS = ["dense", "once", "twice", "transformers"]
FAST = ["twice", "transformers", "timm-vit", "swin"]  # each library, with and without attention, in one file and many


@pytest.mark.parametrize("names", [FAST, pytest.param([*RESNETS, *ATTENTIONS], marks=pytest.mark.slow)], ids=len)
def test_saved_models_are_bit_equal_in_a_fresh_process_without_the_package(tmp_path, names):
    dense = randomise(
        from_backbone(
            "timm/resnet18", id2label=LABELS, image_size=16, small_images=True, image_mean=[0.4, 0.5, 0.6], **NARROW
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
    resnet = from_backbone(ResNetConfig(**TINY_RESNET), id2label=LABELS, image_size=16, small_images=True)
    save(randomise(resnet), tmp_path / "transformers")
    for name in [name for name in names if name in ATTENTIONS]:
        options = {"max_shard_size": "20KB"} if name in ("timm-vit", "swin") else {}
        save(attention_model(name), tmp_path / name, **options)
        assert len(list((tmp_path / name).glob("model*.safetensors"))) > 1 or not options

    printed = run_without_the_package(tmp_path, SCRIPT, str(REPOSITORY), *[str(tmp_path / name) for name in names])
    assert printed.endswith(f"all equal: {len(names)}")
