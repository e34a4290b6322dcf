"""What is saved loads as the same network: changes that the recipe does not say are refused, and so is bad config."""

import copy
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import timm
import torch
from test_modeling import NARROW, TINY_RESNET, TINY_VIT, from_backbone, from_pretrained, narrow, randomise
from timm.layers import DropPath
from torch import nn
from transformers import AutoModelForImageClassification, ResNetConfig, SwinConfig, ViTConfig

from hf_mrpf import MRPFConfig, MRPFTrainer, modeling, plan_pruning, prune, with_new_head
from hf_mrpf.modeling import describe_pruning

TINY_SWIN = {"embed_dim": 12, "depths": [2], "num_heads": [2], "patch_size": 2, "window_size": 8}
torch.set_num_threads(1)


def vit():
    return from_backbone("vit_tiny_patch16_224", num_labels=3, image_size=32, depth=1, embed_dim=24)


def eps(network):
    network.layer2[0].bn1.eps = 1e-3


def kernel(network):
    conv = network.layer1[0].conv1
    conv.weight = nn.Parameter(conv.weight[..., 1:2, 1:2].detach().clone())


@pytest.mark.parametrize(
    ("make", "edit", "message"),
    [
        (narrow, lambda net: setattr(net, "conv1", nn.Conv2d(3, 16, 1, bias=False)), r"conv1\.kernel_size is \(1, 1\)"),
        (narrow, lambda net: setattr(net.layer2[0].conv1, "stride", (1, 1)), r"conv1\.stride is \(1, 1\), .*\(2"),
        (narrow, lambda net: setattr(net, "maxpool", nn.MaxPool2d(2)), "maxpool is in the backbone and not"),
        (narrow, lambda net: setattr(net, "act1", nn.SiLU()), "act1 is a SiLU, and the recipe builds a ReLU"),
        (narrow, lambda net: net.layer3.append(nn.ReLU()), r"layer3\.1 is in the backbone and not in the recipe"),
        (narrow, eps, r"layer2\.0\.bn1\.eps is 0\.001, and the recipe builds 1e-05"),
        (narrow, kernel, r"layer1\.0\.conv1 has kernels of \(1, 1\), and the recipe builds \(3, 3\)"),
        (narrow, lambda net: net.reset_classifier(3), r"num_classes is 3, .* builds 10.*hf_mrpf\.with_new_head"),
        (vit, lambda net: setattr(net, "global_pool", "avg"), "backbone.global_pool is 'avg', .* builds 'token'"),
    ],
)  # fmt: skip
def test_a_backbone_changed_by_hand_is_refused_by_module_and_setting(tmp_path, make, edit, message):
    model = make()
    edit(model.backbone)
    for attempt in (lambda: model.save_pretrained(tmp_path / "model"), lambda: describe_pruning(model)):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert not (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda model: setattr(model.config, "num_labels", 7), "num_classes is 10, and the recipe builds 7"),
        (lambda model: setattr(model.config, "id2label", {1: "a", 2: "b"}), "num_classes is 10, .* builds 2"),
        (lambda model: setattr(model.config, "image_mean", [0.1, 0.2, 0.3]), r"image_mean \[0.0, .*config.json \[0.1"),
        (lambda model: setattr(model.config, "image_std", [1, 1, 0]), "image_std must be above 0"),
        (lambda model: model.image_std.fill_(0.5), r"the model holds image_std \[0.5, "),
        (lambda model: model.backbone.fc.bias.data.fill_(float("nan")), "the model holds NaN in 'backbone.fc.bias'"),
        (lambda model: setattr(model.config, "image_size", 0), "image_size must be a positive integer"),
    ],
)
def test_a_config_that_loading_would_refuse_is_not_saved(tmp_path, edit, message):
    model = narrow()
    edit(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_pruning_refreshes_the_record_of_the_config_and_refuses_before_it_cuts():
    model, images = narrow(), torch.rand(2, 3, 32, 32)
    plan = plan_pruning(model, images, target=0.6, allocation="uniform")
    other = copy.deepcopy(model)
    prune(model, plan)
    assert model.config.pruning == describe_pruning(model) is not None
    built = AutoModelForImageClassification.from_config(model.config)
    assert built.backbone.layer1[0].conv1.weight.shape == model.backbone.layer1[0].conv1.weight.shape
    other.backbone.act1 = nn.SiLU()
    with pytest.raises(ValueError, match="act1 is a SiLU"):
        prune(other, plan)
    assert other.backbone.layer1[0].conv1.weight.shape[0] == 16 and other.config.pruning is None


def test_a_record_that_could_not_be_loaded_is_refused_before_the_cut_and_before_training(monkeypatch):
    model = narrow()
    plan = plan_pruning(model, torch.rand(1, 3, 32, 32), target=0.6, allocation="uniform")
    monkeypatch.setattr("hf_mrpf.units.refresh", lambda model: setattr(model.backbone, "num_features", 999))
    with pytest.raises(ValueError, match=r"\['num_features'\] is 999, larger than the dense backbone's 64"):
        prune(model, plan)
    assert model.backbone.num_features == 64 and describe_pruning(model) is None
    model.backbone.num_features = 999
    with pytest.raises(ValueError, match=r"\['num_features'\] is 999, larger than the dense backbone's 64"):
        MRPFTrainer(model, MRPFConfig(report_to="none"))


SHORT = {"layers": (1, 1, 1, 1), "channels": (16, 32, 32, 32)}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", SHORT | {"global_pool": "catavgmax"}),
        ("resnetv2_18", SHORT),
        ("deit_tiny_distilled_patch16_224", {"patch_size": 8, "depth": 1, "embed_dim": 48}),
        ("hgnet_tiny", {}),
        slow("mobilenetv3_small_050", {"global_pool": "catavgmax"}),
        slow("lcnetv2_base", {}),
        slow("repghostnet_050", {}),
        slow("resnet50_mlp", {}),
        slow("dla34", {}),
    ],
)
def test_whatever_reads_the_features_a_pruned_model_loads_and_takes_a_head_of_timm(tmp_path, name, kwargs):
    model, images = from_backbone(name, num_labels=10, image_size=32, **kwargs).eval(), torch.rand(2, 3, 32, 32)
    prune(model, plan_pruning(model, images, allocation="uniform"))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(images).logits, model(images).logits)
        features = model.backbone.forward_features(images)
        assert model.backbone.num_features == features.shape[1 if features.ndim == 4 else -1]
        if "distilled" not in name:  # whose heads read two tokens
            pooled = model.backbone.forward_head(features, pre_logits=True)
            assert model.backbone.head_hidden_size == pooled.shape[1]
        model.backbone.reset_classifier(3)
        assert model(images).logits.shape == (2, 3)


def test_a_model_of_the_class_that_came_with_its_weights_is_told_to_load_it_again(tmp_path, monkeypatch):
    name = "transformers_modules.checkpoint.modeling"  # as trust_remote_code names it: it registers nothing
    spec = spec_from_file_location(name, modeling.__file__)
    copied = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, copied)
    spec.loader.exec_module(copied)
    narrow().save_pretrained(tmp_path)
    model, images = copied.PrunedForImageClassification.from_pretrained(tmp_path), torch.rand(2, 3, 32, 32)
    plan = plan_pruning(narrow(), images, target=0.6, allocation="uniform")
    for attempt in (
        lambda: plan_pruning(model, images, target=0.6, allocation="uniform"),
        lambda: prune(model, plan),
        lambda: prune(nn.Sequential(model), plan),
        lambda: with_new_head(model, ["a", "b"]),
        lambda: MRPFTrainer(model, MRPFConfig(output_dir=str(tmp_path / "run"))),
    ):
        with pytest.raises(ValueError, match=rf"own code \({name}\).*: import hf_mrpf first and load it again"):
            attempt()
    assert model.backbone.layer1[0].conv1.weight.shape[0] == 16


def settings(model):
    model.backbone.drop_rate = 0.3
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
        if isinstance(module, nn.ReLU):
            module.inplace = False
    if hasattr(model.backbone, "layer1"):
        model.backbone.layer1[0].drop_path = DropPath(0.1)


def test_norms_that_timm_has_synchronised_and_tensors_that_are_shared_out_are_saved(tmp_path, monkeypatch):
    model = from_backbone("tf_mobilenetv3_small_minimal_100", num_labels=3, image_size=32)
    expected = describe_pruning(model)
    model.backbone = timm.layers.convert_sync_batchnorm(model.backbone)
    assert describe_pruning(model) == expected
    # A look at one is an exchange with all processes, of which this is the only one that saves.
    monkeypatch.setattr(torch.Tensor, "to_local", None, raising=False)
    monkeypatch.setattr(torch.Tensor, "isnan", None)
    model.save_pretrained(tmp_path / "model")


STATES = {
    "trained": lambda model: model.train()(torch.rand(2, 3, 16, 16)),
    "checkpointing": lambda model: model.supports_gradient_checkpointing and model.gradient_checkpointing_enable(),
    "settings of training": settings,
    "compiled": lambda model: model.backbone.compile(backend="eager"),
    "half": lambda model: model.bfloat16(),
    "hung on": lambda model: setattr(model.backbone, "is_parallelizable", True),
    "synchronised": nn.SyncBatchNorm.convert_sync_batchnorm,
}
NETWORKS = {
    "timm": ("resnet18", {"small_images": True, **NARROW}),
    "resnet": (ResNetConfig(**TINY_RESNET), {"small_images": True}),
    "vit": (ViTConfig(**TINY_VIT, patch_size=4), {}),
    # Its windows are as large as the map, to which it fits them when it runs.
    "swin": (SwinConfig(**TINY_SWIN), {}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_ordinary_states_of_a_model_are_saved_pruned_or_not(tmp_path, name):
    backbone, kwargs = NETWORKS[name]
    dense = randomise(from_backbone(backbone, num_labels=4, image_size=16, **kwargs))
    pruned = copy.deepcopy(dense)
    prune(pruned, plan_pruning(pruned, torch.rand(1, 3, 16, 16), target=0.6, allocation="uniform", min_channels=2))
    record = describe_pruning(pruned)
    for state, bring in STATES.items():
        for model, expected in ((copy.deepcopy(dense), None), (copy.deepcopy(pruned), record)):
            bring(model)
            assert describe_pruning(model) == expected, state
    images = torch.rand(2, 3, 16, 16)
    settings(pruned)
    pruned.eval().save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert torch.equal(loaded(images).logits, pruned(images).logits)
    assert describe_pruning(loaded) == record
