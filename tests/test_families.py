"""Every supported family: a pruned network equals its masked original, meets its target, trains, and loads again."""

import copy
import time

import pytest
import timm
import torch
import transformers
from pruning_reference import EXACT, check_against_masked, check_family, masked, randomise, relative_error
from torch import nn

from hf_mrpf.architectures import ATTENTIONS, register_attention
from hf_mrpf.efficiency import count_macs
from hf_mrpf.modeling import PrunedForImageClassification
from hf_mrpf.plan import PruningPlan
from hf_mrpf.pruning import plan_pruning, prune
from hf_mrpf.units import pruning_units, trace_units


def hf(name, **values):
    config = getattr(transformers, f"{name}Config")
    return lambda: config(num_labels=10, architectures=[f"{name}ForImageClassification"], **values)


VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2}
MOBILEVIT = {"hidden_sizes": [48, 64, 80], "neck_hidden_sizes": [16, 16, 24, 32, 32, 48, 96]}
# Name -> (timm name or function that makes a transformers config, image size, arguments).
FAST = {
    "timm ViT": ("vit_tiny_patch16_224", 32, {"img_size": 32, "patch_size": 8, "depth": 2}),
    "timm DeiT": ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "patch_size": 8, "depth": 2}),
    "timm Swin": (
        "swin_tiny_patch4_window7_224",
        32,
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    "timm MobileViT": ("mobilevit_xxs", 64, {}),
    "timm MobileViTV2": ("mobilevitv2_050", 64, {}),
    "timm ConvNeXt": ("convnext_atto", 32, {"depths": (1, 2, 1, 1), "dims": (16, 24, 32, 40)}),
    "timm EfficientNet": ("test_efficientnet", 64, {}),
    "timm MobileNetV2": ("mobilenetv2_035", 64, {}),
    "timm MobileNetV3": ("mobilenetv3_small_050", 64, {}),
    "timm RegNet": ("regnetx_002", 32, {}),
    "timm ResNeXt": ("resnext50_32x4d", 32, {"layers": (1, 2, 1, 1), "channels": (32, 32, 64, 64)}),
    "timm DenseNet": ("densenet121", 32, {"block_config": (2, 3, 2, 2), "growth_rate": 16, "bn_size": 2}),
    "transformers ViT": (hf("ViT", image_size=32, patch_size=8, **VIT), 32, {}),
    "transformers DeiT": (hf("DeiT", image_size=32, patch_size=8, **VIT), 32, {}),
    "transformers Swin": (hf("Swin", image_size=32, **SWIN), 32, {}),
    "transformers MobileViT": (hf("MobileViT", image_size=64, **MOBILEVIT), 64, {}),
    "transformers MobileViTV2": (hf("MobileViTV2", image_size=64, width_multiplier=0.25), 64, {}),
    "transformers ConvNeXt": (hf("ConvNext", hidden_sizes=[16, 24, 32, 40], depths=[1, 2, 1, 1]), 32, {}),
    "transformers ResNet": (hf("ResNet", embedding_size=16, hidden_sizes=[24, 32, 48], depths=[2, 1, 2]), 32, {}),
}
WHOLE = {
    "timm ViT": ("vit_tiny_patch16_224", 224, {}),
    "timm DeiT": ("deit_tiny_patch16_224", 224, {}),
    "timm Swin": ("swin_tiny_patch4_window7_224", 224, {}),
    "timm MobileViT xxs": ("mobilevit_xxs", 256, {}),
    "timm MobileViT xs": ("mobilevit_xs", 256, {}),
    "timm MobileViT s": ("mobilevit_s", 256, {}),
    "timm MobileViTV2": ("mobilevitv2_100", 256, {}),
    "timm ConvNeXt": ("convnext_tiny", 224, {}),
    "timm EfficientNet": ("efficientnet_b0", 224, {}),
    "timm MobileNetV2": ("mobilenetv2_100", 224, {}),
    "timm MobileNetV3": ("mobilenetv3_large_100", 224, {}),
    "timm ResNeXt": ("resnext50_32x4d", 224, {}),
    "timm RegNet": ("regnety_002", 224, {}),
    "timm DenseNet": ("densenet121", 224, {}),
    "transformers ViT": (hf("ViT", hidden_size=192, num_attention_heads=3, intermediate_size=768), 224, {}),
    "transformers DeiT": (hf("DeiT", hidden_size=192, num_attention_heads=3, intermediate_size=768), 224, {}),
    "transformers Swin": (hf("Swin"), 224, {}),
    "transformers MobileViT": (hf("MobileViT"), 256, {}),
    "transformers MobileViTV2": (hf("MobileViTV2"), 256, {}),
    "transformers ConvNeXt": (hf("ConvNext"), 224, {}),
    "transformers ResNet": (hf("ResNet"), 224, {}),
}


def network(family):
    """The plain network."""
    source, _, values = family
    if isinstance(source, str):
        return timm.create_model(source, num_classes=10, **values)
    return transformers.AutoModelForImageClassification.from_config(source())


def wrapped(family):
    source, size, values = family
    values = {key: value for key, value in values.items() if key != "img_size"}
    backbone = f"timm/{source}" if isinstance(source, str) else source()
    return PrunedForImageClassification.from_backbone(backbone, num_labels=10, image_size=size, **values)


@pytest.mark.parametrize("name", FAST)
def test_a_pruned_network_equals_its_masked_original(name):
    family = FAST[name]
    check_family(lambda: network(family), family[1], targets=(0.3, 0.5, 0.7), tolerance=0.02, min_channels=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_pruned_network_equals_its_masked_original_and_takes_seconds(name):
    family = WHOLE[name]
    model, images = network(family), torch.rand(1, 3, family[1], family[1])
    start = time.perf_counter()
    prune(model, plan_pruning(model, images, allocation="uniform", target=0.5))
    assert time.perf_counter() - start < 10
    check_family(lambda: network(family), family[1], targets=(0.3, 0.5, 0.7), tolerance=0.02)


@pytest.mark.parametrize("name", FAST)
def test_a_pruned_network_loads_again_bit_for_bit(name, tmp_path):
    model = wrapped(FAST[name]).eval()
    images = torch.rand(2, 3, FAST[name][1], FAST[name][1])
    prune(model, plan_pruning(model, images, allocation="uniform", importance="random", target=0.6, min_channels=2))
    model.save_pretrained(tmp_path)
    loaded = PrunedForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(images).logits, loaded(images).logits)
    # What loads is as ready to be pruned as what was saved.
    again = plan_pruning(loaded, images, allocation="uniform", importance="random", target=0.6, min_channels=2)
    prune(loaded, again)
    assert count_macs(loaded, images) == again.after["macs"]


@pytest.mark.parametrize("name", FAST)
def test_widths_are_rounded(name):
    model, images = network(FAST[name]), torch.rand(1, 3, FAST[name][1], FAST[name][1])
    plan = plan_pruning(model, images, allocation="uniform", target=0.6, round_to=8)
    for unit in plan.units:
        kept = plan.kept[unit.name]
        width = len(kept["v"][0]) if unit.kind == "attention" else len(kept)
        assert width % 8 == 0 or width == unit.width
    prune(model, plan)
    assert count_macs(model, images) == plan.after["macs"]
