"""Forms for small images: they are pruned, saved and loaded."""

import pytest
import torch
from torch import nn
from transformers import MobileViTConfig, MobileViTV2Config, ViTConfig

from hf_mrpf import PrunedForImageClassification, plan_pruning, prune

MOBILEVIT = {
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
    "num_attention_heads": 2,
    "expand_ratio": 2.0,
}


BACKBONES = {
    "timm-v1": "timm/mobilevit_xxs",
    "timm-v2": "timm/mobilevitv2_050",
    "transformers-v1": MobileViTConfig(**MOBILEVIT),
    "transformers-v2": MobileViTV2Config(width_multiplier=0.25),
}
# Each library, generation and size once.
FAST = (("timm-v2", 64), ("transformers-v1", 32))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=() if (name, size) in FAST else pytest.mark.slow)
        for name in BACKBONES
        for size in (32, 64)
    ],
)
def test_mobilevit_keeps_a_last_map_of_four_by_four(name, size, tmp_path):
    model = PrunedForImageClassification.from_backbone(
        BACKBONES[name], num_labels=10, image_size=size, small_images=True
    )
    maps = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: maps.append(tuple(output.shape[-2:])))
    images = torch.rand(2, 3, size, size)
    model.eval()(images)
    assert maps[0] == (size, size)
    assert [pixels for pixels in maps if pixels[0] == pixels[1] > 1][-1] == (4, 4)
    plan = plan_pruning(model, images, allocation="uniform", target=0.5, min_channels=2)
    assert plan.achieved["macs"] == pytest.approx(0.5, rel=0.02)
    prune(model, plan).save_pretrained(tmp_path)
    logits = model(images).logits
    assert torch.equal(PrunedForImageClassification.from_pretrained(tmp_path).eval()(images).logits, logits)


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("timm/vit_tiny_patch16_224", {"patch_size": 4, "depth": 1}),
        ("timm/swin_tiny_patch4_window7_224", {"patch_size": 2, "window_size": 4, "depths": (1, 1, 1, 1)}),
    ],
)
def test_vit_and_swin_take_small_images_by_patch_and_window(backbone, options):
    model = PrunedForImageClassification.from_backbone(backbone, num_labels=10, image_size=32, **options)
    assert model(torch.rand(1, 3, 32, 32)).logits.shape == (1, 10)


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("timm/vit_tiny_patch16_224", {"small_images": True}, "A ViT or a Swin needs none: give it image_size with"),
        ("timm/gernet_s", {"small_images": True}, "only MobileViT and MobileViTV2 have a form"),
        ("timm/vit_tiny_patch16_224", {"image_size": 8}, "image_size 8|img_size.*8"),
        (ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2), {"image_size": 8}, "image_size 8"),
    ],
)
def test_sizes_and_forms_that_cannot_work_are_refused(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        PrunedForImageClassification.from_backbone(backbone, num_labels=10, **options)
