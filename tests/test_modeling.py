"""The model class: recipes, small images, forward, pruning records, saving and strict loading."""

import copy
import json
import shutil
from fractions import Fraction
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    DeiTConfig,
    EfficientNetImageProcessor,
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from hf_mrpf.modeling import PrunedConfig, PrunedForImageClassification, apply_pruning, describe_pruning

NARROW = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64], "stem_type": "deep", "stem_width": 8}
TINY_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
from_backbone = PrunedForImageClassification.from_backbone
from_pretrained = PrunedForImageClassification.from_pretrained


def narrow(**kwargs):
    return from_backbone("timm/resnet18", num_labels=10, image_size=32, small_images=True, **NARROW, **kwargs).eval()


def keep(tensor, count, dim=0):
    """The last channels: not those that apply_pruning would keep."""
    return nn.Parameter(tensor.detach().narrow(dim, tensor.shape[dim] - count, count).clone())


def shrink_block(block, width):
    """Cut the inner width of a timm BasicBlock."""
    block.conv1.weight, block.conv1.out_channels = keep(block.conv1.weight, width), width
    for name in ("weight", "bias"):
        setattr(block.bn1, name, keep(getattr(block.bn1, name), width))
    for name in ("running_mean", "running_var"):
        setattr(block.bn1, name, keep(getattr(block.bn1, name), width).detach())
    block.bn1.num_features = width
    block.conv2.weight, block.conv2.in_channels = keep(block.conv2.weight, width, 1), width


def shrink_heads(attention, width):
    """Cut the head dimension of a timm Attention, the same dimensions in q, k, v and the projection."""
    heads, old = attention.num_heads, attention.head_dim
    kept = torch.arange(heads * old).view(heads, old)[:, old - width :].flatten()
    rows = torch.cat([kept + part * heads * old for part in range(3)])
    attention.qkv.weight = nn.Parameter(attention.qkv.weight.detach()[rows].clone())
    attention.qkv.bias = nn.Parameter(attention.qkv.bias.detach()[rows].clone())
    attention.proj.weight = nn.Parameter(attention.proj.weight.detach()[:, kept].clone())
    attention.qkv.out_features, attention.proj.in_features = 3 * heads * width, heads * width
    attention.head_dim, attention.attn_dim, attention.scale = width, heads * width, width**-0.5


def randomise(model):
    """Give every parameter and statistic a value of its own: defaults hide errors."""
    for name, tensor in model.backbone.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) * 0.2 + (0.5 if name.endswith("running_var") else -0.1))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A narrow pruned model, its folder, images and logits."""
    torch.manual_seed(0)
    model = randomise(narrow(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]))
    shrink_block(model.backbone.layer2[0], 20)
    folder = tmp_path_factory.mktemp("pruned")
    model.save_pretrained(folder)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        return model, folder, images, model(images).logits


@pytest.fixture
def broken(saved, tmp_path):
    """A copy of the saved folder and functions that change its tensors or its config."""
    folder = tmp_path / "copy"
    shutil.copytree(saved[1], folder)

    def change(tensors=None, config=None):
        if tensors:
            held = load_file(folder / "model.safetensors")
            tensors(held)
            save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        if config:
            held = json.loads((folder / "config.json").read_text())
            config(held)
            (folder / "config.json").write_text(json.dumps(held))
        return folder

    return change


# --- recipes -----------------------------------------------------------------------------------------------------


def macs(model, size=32):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.rand(1, 3, size, size))
    return counter.get_total_flops() / 2


def test_cifar_resnet18_and_vgg16_have_the_published_sizes():
    resnet = from_backbone("timm/resnet18", num_labels=10, image_size=32, small_images=True)
    assert sum(p.numel() for p in resnet.parameters()) == 11_173_962
    assert macs(resnet) == pytest.approx(0.556e9, rel=0.01)
    assert (resnet.backbone.conv1.kernel_size, resnet.backbone.conv1.stride) == ((3, 3), (1, 1))
    vgg = from_backbone("vgg16_bn", num_labels=10, image_size=32, small_images=True)
    assert sum(p.numel() for p in vgg.parameters()) == 14_728_266
    assert macs(vgg) == pytest.approx(0.313e9, rel=0.01)
    assert vgg.backbone.head.fc.weight.shape == (10, 512)
    assert describe_pruning(resnet) is describe_pruning(vgg) is None


def test_small_images_replaces_a_deep_stem_and_transformers_stem():
    backbone = narrow().backbone
    assert isinstance(backbone.conv1, nn.Conv2d)
    assert backbone.conv1.weight.shape == (16, 3, 3, 3)
    assert isinstance(backbone.maxpool, nn.Identity)
    model = from_backbone(ResNetConfig(**TINY_RESNET), num_labels=4, image_size=8, small_images=True)
    embedder = model.backbone.resnet.embedder
    assert embedder.embedder.convolution.weight.shape == (8, 3, 3, 3)
    assert embedder.embedder.convolution.stride == (1, 1)
    assert isinstance(embedder.pooler, nn.Identity)
    assert model(torch.rand(2, 3, 8, 8)).logits.shape == (2, 4)


def test_small_images_of_other_families_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"small_images: .*ConvNeXt; known: timm\.models\.resnet\.ResNet, timm"):
        from_backbone("convnext_atto", small_images=True)


@pytest.mark.parametrize(
    ("name", "size", "kwargs", "message"),
    [
        ("vgg11", 16, {"small_images": True}, "'vgg11' cannot run at image_size 16: .*too small"),
        ("vit_tiny_patch16_224", 8, {}, "'vit_tiny_patch16_224' cannot run at image_size 8: .*size"),
    ],
)
def test_image_sizes_that_cannot_work_are_refused_before_weights_are_drawn(name, size, kwargs, message):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        from_backbone(name, image_size=size, **kwargs)
    assert torch.equal(torch.get_rng_state(), state)


def test_building_draws_exactly_what_timm_draws():
    import timm

    torch.manual_seed(3)
    plain = timm.create_model("resnet18", num_classes=10, **NARROW)
    torch.manual_seed(3)
    model = from_backbone("resnet18", num_labels=10, **NARROW)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.backbone.parameters(), strict=True))
    assert not model.backbone.bn1.running_mean.any()
    assert model.training


def test_image_size_reaches_only_constructors_that_take_it():
    vit = from_backbone("vit_tiny_patch16_224", num_labels=3, image_size=32, depth=1, embed_dim=24)
    assert vit.config.backbone["kwargs"] == {"depth": 1, "embed_dim": 24, "img_size": 32}
    assert vit.backbone.pos_embed.shape == (1, 5, 24)
    assert from_backbone("vit_tiny_patch16_224", img_size=48, depth=1, embed_dim=24).config.image_size == 48
    resnet = from_backbone("resnet18", image_size=64, **NARROW)
    assert "img_size" not in resnet.config.backbone["kwargs"]
    assert (resnet.config.image_size, resnet.config.num_labels) == (64, 1000)
    assert from_backbone(ViTConfig(**TINY_VIT), image_size=64).backbone.config.image_size == 64
    assert from_backbone("mobilevitv2_050").config.image_size == 256


def test_labels():
    model = narrow_labels = from_backbone("resnet18", id2label={0: "cat", 1: "dog", 2: "owl"}, image_size=32, **NARROW)
    assert model.config.num_labels == narrow_labels.backbone.fc.out_features == 3
    assert model.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    with pytest.raises(ValueError, match="num_labels is 4, but id2label names 3 classes"):
        from_backbone("resnet18", num_labels=4, id2label={0: "a", 1: "b", 2: "c"})
    with pytest.raises(ValueError, match="num_labels must be a positive integer, got True"):
        from_backbone("resnet18", num_labels=True)
    assert from_backbone("resnet18", id2label=["cat", "dog"], **NARROW).config.label2id == {"cat": 0, "dog": 1}
    for names, message in (
        ({1: "a", 2: "b"}, r"must number its 2 classes from 0 to 1, got \[1, 2\]"),
        ({"a": 0, "b": 1}, "id2label must be a list or a dict of names"),
        ("ab", "id2label must be a list or a dict of names, got 'ab'"),
        (3, "id2label must be a list or a dict of names, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            from_backbone("resnet18", id2label=names)
    with pytest.raises(ValueError, match="num_labels is 4, but id2label names 2 classes"):
        from_backbone("resnet18", num_labels=4, id2label=["a", "b"])


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, lambda values: [torch.tensor(value) for value in values]])
def test_statistics_come_as_any_numbers(kind):
    config = PrunedConfig(image_mean=kind([0.25, 0.5, 0.75]), image_std=[np.float32(0.5), Fraction(1, 2), 1])
    assert (config.image_mean, config.image_std) == ([0.25, 0.5, 0.75], [0.5, 0.5, 1.0])
    assert {type(value) for value in config.image_mean + config.image_std} == {float}
    for wrong in (kind([0.5]), torch.tensor(0.5), np.array([True] * 3), kind([0.5, 0.5, float("nan")])):
        with pytest.raises(ValueError, match="image_mean must be 3 finite numbers"):
            PrunedConfig(image_mean=wrong)


@pytest.mark.parametrize(
    ("backbone", "kwargs", "message"),
    [
        ("timm/resnet81", {}, "timm has no model 'resnet81'; close names: .*resnet18"),
        ("resnt50", {}, "timm has no model 'resnt50'; close names: .*resnet50"),
        ("resnet18.nobody", {}, r"timm has no weights 'resnet18\.nobody'; known: .*resnet18\.a1_in1k"),
        (nn.Linear(2, 2), {}, "got Linear: a network without a known recipe could not be built again"),
        ("resnet18", {"checkpoint_path": "x.pt"}, "may not hold checkpoint_path"),
        ("resnet18", {"no_such_argument": 1}, "timm cannot build 'resnet18' with .*no_such_argument"),
        ("resnet18", {"act_layer": nn.GELU}, "must be JSON values"),
        ("resnet18", {"in_chans": 1}, "'resnet18' cannot run"),
        (ResNetConfig(), {"no_such": 1}, "ResNetConfig has no no_such; it has .*hidden_sizes"),
        (PrunedConfig(), {}, "of type 'mrpf': load a saved model of this class with from_pretrained"),
    ],
)
def test_unknown_backbones_and_arguments_are_refused(backbone, kwargs, message):
    with pytest.raises(ValueError, match=message):
        from_backbone(backbone, **kwargs)


def test_weights_of_a_transformers_model_are_copied_and_a_new_head_is_made_where_labels_differ():
    source = ResNetForImageClassification(ResNetConfig(**TINY_RESNET, num_labels=4, id2label=dict(enumerate("abcd"))))
    images = torch.rand(2, 3, 32, 32)
    model = from_backbone(source.eval(), image_size=32).eval()
    assert torch.equal(model(images).logits, source(images).logits)
    assert model.config.id2label == dict(enumerate("abcd"))
    model.backbone.classifier[1].weight.data.zero_()
    assert source.classifier[1].weight.any()
    other = from_backbone(source, num_labels=7, image_size=32)
    assert other.backbone.classifier[1].weight.shape == (7, 16)
    own = "resnet.embedder.embedder.convolution.weight"
    assert torch.equal(other.backbone.state_dict()[own], source.state_dict()[own])
    vit = ViTForImageClassification(ViTConfig(**TINY_VIT, image_size=32))
    with pytest.raises(ValueError, match="position_embeddings have shape"):
        from_backbone(vit, image_size=64)
    with pytest.raises(ValueError, match="got ViTModel: pass ViTForImageClassification"):
        from_backbone(ViTModel(ViTConfig(**TINY_VIT)))
    with pytest.raises(ValueError, match="differ in tensors"):
        from_backbone(vit, image_size=32, num_hidden_layers=2)


def test_transformers_folder_brings_its_normalisation_and_channel_order(tmp_path):
    config = MobileViTConfig(
        image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[4, 8, 8, 16, 16, 16, 32], num_labels=3
    )
    source = MobileViTForImageClassification(config).eval()
    source.save_pretrained(tmp_path)
    MobileViTImageProcessor(do_flip_channel_order=True).save_pretrained(tmp_path)
    model = from_backbone(str(tmp_path)).eval()
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(model(images).logits, source(images.flip(1)).logits, atol=1e-6)
    assert model.config.image_mean == [0.0, 0.0, 0.0]
    MobileViTImageProcessor(
        do_flip_channel_order=False, do_normalize=True, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.5]
    ).save_pretrained(tmp_path)
    assert from_backbone(str(tmp_path)).config.image_mean == [0.1, 0.2, 0.3]


def test_weights_without_a_processor_need_the_normalisation_to_be_given(tmp_path):
    vit = ViTForImageClassification(ViTConfig(**TINY_VIT, image_size=16, patch_size=8, num_labels=3))
    vit.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="there is no preprocessor_config.json .* or give image_mean and image_std"):
        from_backbone(str(tmp_path), image_mean=[0.1, 0.2, 0.3])
    model = from_backbone(str(tmp_path), **CHANNELS)
    assert (model.config.image_mean, model.config.image_std) == (CHANNELS["image_mean"], CHANNELS["image_std"])
    images = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(CHANNELS[name])[:, None, None] for name in ("image_mean", "image_std"))
    assert torch.equal(model.eval()(images).logits, vit.eval()((images - mean) / std).logits)
    # It may say more than mean and std, such as an order of the channels, so a damaged one is not passed over.
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(OSError, match="preprocessor_config.json"):
        from_backbone(str(tmp_path), **CHANNELS)


CHANNELS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    ResNetForImageClassification(ResNetConfig(**TINY_RESNET, num_labels=3)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ViTImageProcessor, {}),
        (ViTImageProcessor, {"do_normalize": False}),
        (ViTImageProcessor, {"rescale_factor": 1 / 127.5}),
        (ViTImageProcessor, {"rescale_factor": 1 / 127.5, "do_normalize": False}),
        (ViTImageProcessor, {"do_rescale": False}),
        (ViTImageProcessor, {"do_rescale": False, "do_normalize": False}),
        (EfficientNetImageProcessor, {}),
        (EfficientNetImageProcessor, {"include_top": False}),
        (EfficientNetImageProcessor, {"do_normalize": False}),
        (EfficientNetImageProcessor, {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
        (EfficientNetImageProcessor, {"rescale_offset": True, "include_top": False, "do_normalize": False}),
        (EfficientNetImageProcessor, {"rescale_offset": True, "do_rescale": False}),
    ],
)
def test_a_transformers_network_gets_the_pixels_that_its_processor_would_give_it(resnet_folder, kind, options):
    processor = kind(**CHANNELS, **options, do_resize=False)
    processor.save_pretrained(resnet_folder)
    model = from_backbone(str(resnet_folder), image_size=32)
    pixels, given = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), []
    model.backbone.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    model(pixels / 255)
    expected = processor(list(pixels), return_tensors="pt")["pixel_values"].float()
    assert torch.allclose(given[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale_factor": 0}, "rescale_factor must be a finite number above 0, got 0"),
        ({"rescale_factor": "x"}, "rescale_factor must be a finite number above 0, got 'x'"),
        ({"image_std": [0.1, 0, 0.1]}, "image_std must be above 0"),
        ({"image_mean": [0.5]}, "image_mean must be 3 finite numbers"),
    ],
)
def test_a_processor_that_no_normalisation_could_follow_is_refused(resnet_folder, options, message):
    content = {"image_processor_type": "ViTImageProcessor", "do_rescale": True, "do_normalize": True}
    (resnet_folder / "preprocessor_config.json").write_text(json.dumps(content | CHANNELS | options))
    with pytest.raises(ValueError, match=rf"{resnet_folder.name}.*: preprocessor_config.json: {message}"):
        from_backbone(str(resnet_folder))


def test_a_config_with_two_classification_classes_gets_the_plain_one():
    config = DeiTConfig(**TINY_VIT, image_size=32)
    assert type(from_backbone(config, num_labels=3).backbone).__name__ == "DeiTForImageClassification"


def test_a_bare_architecture_has_random_weights_and_no_normalisation():
    model = from_backbone("resnet18", **NARROW)
    assert (model.config.image_mean, model.config.image_std) == ([0.0] * 3, [1.0] * 3)


# --- config ------------------------------------------------------------------------------------------------------


def test_config_round_trips_and_is_default_constructible():
    config = PrunedConfig(
        backbone={"source": "timm", "name": "resnet18", "kwargs": {"layers": (1, 1, 1, 1)}},
        image_size=32,
        image_mean=(0.1, 0.2, 0.3),
        small_images=True,
        pruning={"shapes": {}, "attrs": {}},
        id2label={0: "a", 1: "b", 2: "c"},
    )
    again = PrunedConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.num_labels == 3
    assert PrunedConfig().backbone == {"source": "timm", "name": "resnet18", "kwargs": {}}
    assert PrunedConfig(num_labels=7).num_labels == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": True}, "image_size must be a positive integer"),
        ({"image_size": 32.0}, "image_size must be a positive integer"),
        ({"image_mean": [0.1, 0.2]}, "image_mean must be 3 finite numbers"),
        ({"image_mean": "abc"}, "image_mean must be 3 finite numbers"),
        ({"image_std": [1, 1, 0]}, "image_std must be above 0"),
        ({"small_images": "yes"}, "small_images must be true or false"),
        ({"pruning": [1]}, "pruning must be null or an object"),
        ({"backbone": "resnet18"}, "backbone must be an object with 'source' one of"),
        ({"backbone": {"source": "file", "path": "/x"}}, "'source' one of"),
        ({"backbone": {"source": "timm", "name": 3, "kwargs": {}}}, r"backbone\['name'\] must be of type str"),
        ({"backbone": {"source": "timm", "name": "a", "kwargs": {}, "b": 1}}, "unknown fields"),
        ({"id2label": {}}, "id2label must name at least one class"),
        ({"id2label": 3}, "config.json"),
        ({"id2label": {"1": "a", "2": "b"}}, r"id2label must number its 2 classes from 0 to 1, got \[1, 2\]"),
    ],
)
def test_config_refuses_other_kinds_of_values(values, message):
    with pytest.raises(ValueError, match=message):
        PrunedConfig.from_dict(values)


@pytest.mark.parametrize(
    "backbone",
    [
        {"source": "timm", "name": "hf-hub:user/model", "kwargs": {}},
        {"source": "timm", "name": "local-dir:/somewhere", "kwargs": {}},
        {"source": "timm", "name": "../resnet18", "kwargs": {}},
        {"source": "timm", "name": "resnet18", "kwargs": {"pretrained_cfg": {"file": "/x"}}},
        {"source": "timm", "name": "resnet18", "kwargs": {"channels": [10**15, 1, 1, 1]}},
        {"source": "timm", "name": "resnet18", "kwargs": {"channels": [-4, 1, 1, 1]}},
        {"source": "transformers", "config": {"model_type": "timm_wrapper", "architecture": "resnet18"}},
        {"source": "transformers", "config": {"model_type": "mrpf"}},
        {"source": "transformers", "config": {"model_type": "no_such"}},
        {"source": "transformers", "config": {"model_type": "bert"}},
        {"source": "transformers", "config": {"model_type": "resnet", "depths": 3}},
    ],
)
def test_hostile_recipes_are_refused(backbone):
    with pytest.raises(ValueError, match=r"backbone|cannot build|config\.json"):
        PrunedForImageClassification(PrunedConfig(backbone=backbone))


# --- forward -----------------------------------------------------------------------------------------------------


def test_forward_normalises_and_returns_loss_and_logits(saved):
    model, _, images, logits = saved
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    labels = torch.tensor([1, 2, 3])
    with torch.no_grad():
        assert torch.equal(model.backbone((images - mean[:, None, None]) / std[:, None, None]), logits)
        output = model(images, labels=labels)
        assert torch.equal(output.loss, F.cross_entropy(logits, labels))
        loss, alone = model(images, labels, return_dict=False)
        assert torch.equal(alone, logits) and torch.equal(loss, output.loss)
        assert len(model(images, return_dict=False)) == 1
    assert model(images).loss is None


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "got torch.uint8: divide 8-bit pixels by 255"),
        (torch.zeros(1, 1, 32, 32), r"got \(1, 1, 32, 32\): convert greyscale"),
        (torch.zeros(3, 32, 32), r"got \(3, 32, 32\)"),
        (None, r"must be a tensor of shape \(N, 3, H, W\), floating point in \[0, 1\], got NoneType"),
        (torch.zeros(1, 3, 32, 32).numpy(), "must be a tensor .* got ndarray"),
    ],
)
def test_forward_refuses_other_images(saved, images, message):
    with pytest.raises(ValueError, match=message):
        saved[0](images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_of_data_parallel_answer_like_the_original(saved, monkeypatch, dtype):
    model, images = copy.deepcopy(saved[0]).to(dtype), saved[2]
    # Stands for the copies on other devices, which are not leaves either; all else is PyTorch's own.
    module = import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        module, "_broadcast_coalesced_reshape", lambda tensors, devices, detach: [[t * 1 for t in tensors]]
    )
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    (replica,) = module.replicate(model, [0])
    assert not list(replica.parameters())
    assert torch.equal(replica(images).logits, model(images).logits)


def test_statistics_stay_float32_in_every_dtype(saved):
    model, folder, images, logits = saved
    exact = model.image_mean
    cast = copy.deepcopy(model)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = from_pretrained(folder, dtype=dtype)
        for other in (loaded, cast.to(dtype)):
            assert other.dtype == dtype
            assert torch.equal(other.image_mean, exact) and other.image_std.dtype == torch.float32
            assert other(images).logits.dtype == dtype
            assert torch.allclose(other(images).logits.float(), logits, rtol=0.1, atol=0.02)
    half = copy.deepcopy(model).half()
    assert torch.equal(half.image_mean, exact)
    double = copy.deepcopy(model).double()
    assert double(images.double()).logits.dtype == torch.float64
    assert torch.allclose(double(images.double()).logits.float(), logits, atol=1e-5)


@pytest.mark.slow
def test_deepcopy_compile_and_gradient_checkpointing_change_nothing(saved):
    model, _, images, logits = saved
    assert torch.equal(copy.deepcopy(model)(images).logits, logits)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images).logits, logits)
    labels = torch.tensor([0, 1, 2])
    small = from_backbone(ViTConfig(**TINY_VIT), num_labels=3, image_size=32)
    for base in (model, small):
        plain = copy.deepcopy(base).train()
        checked = copy.deepcopy(plain)
        checked._set_gradient_checkpointing(True) if base is model else checked.gradient_checkpointing_enable()
        for each in (plain, checked):
            each(images, labels=labels).loss.backward()
        for a, b in zip(plain.parameters(), checked.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-6)
        assert any(getattr(m, "gradient_checkpointing", getattr(m, "grad_checkpointing", 0)) for m in checked.modules())
    assert not from_backbone("vgg11", image_size=32, small_images=True).supports_gradient_checkpointing


def test_eager_attention_on_request(tmp_path):
    model = from_backbone("vit_tiny_patch16_224", num_labels=3, image_size=32, depth=1, embed_dim=24).eval()
    model.save_pretrained(tmp_path)
    eager = from_pretrained(tmp_path, attn_implementation="eager")
    assert model.backbone.blocks[0].attn.fused_attn and not eager.backbone.blocks[0].attn.fused_attn
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(model(images).logits, eager(images).logits, atol=1e-5)
    hf = from_backbone(ViTConfig(**TINY_VIT), num_labels=3, image_size=32)
    hf.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path, attn_implementation="eager").backbone.config._attn_implementation == "eager"
    assert from_pretrained(tmp_path).backbone.config._attn_implementation == "sdpa"


# --- pruning records ---------------------------------------------------------------------------------------------


def test_record_says_exactly_what_differs():
    model = narrow()
    assert describe_pruning(model) is None
    shrink_block(model.backbone.layer1[0], 10)
    block = "backbone.layer1.0"
    assert describe_pruning(model) == {
        "shapes": {
            f"{block}.conv1.weight": [10, 16, 3, 3],
            f"{block}.conv2.weight": [16, 10, 3, 3],
            **{f"{block}.bn1.{name}": [10] for name in ("weight", "bias", "running_mean", "running_var")},
        },
        "attrs": {
            f"{block}.conv1": {"out_channels": 10},
            f"{block}.conv2": {"in_channels": 10},
            f"{block}.bn1": {"num_features": 10},
        },
    }


def test_applying_a_record_gives_the_same_sizes_and_a_network_that_runs():
    model = narrow()
    shrink_block(model.backbone.layer3[0], 17)
    record = json.loads(json.dumps(describe_pruning(model)))
    other = narrow()
    other.backbone.layer3[0].conv1.weight.requires_grad_(False)
    apply_pruning(other, record)
    assert describe_pruning(other) == record
    assert not other.backbone.layer3[0].conv1.weight.requires_grad
    other.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(other(images).logits, model(images).logits)


def test_record_of_attention_holds_head_sizes_and_scale(tmp_path):
    model = from_backbone("vit_tiny_patch16_224", num_labels=3, image_size=32, depth=2, embed_dim=24).eval()
    shrink_heads(model.backbone.blocks[1].attn, 5)
    record = describe_pruning(model)
    assert record["attrs"]["backbone.blocks.1.attn"] == {"attn_dim": 15, "head_dim": 5, "scale": 5**-0.5}
    assert record["attrs"]["backbone.blocks.1.attn.qkv"] == {"out_features": 45}
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(from_pretrained(tmp_path)(images).logits, model(images).logits)


def test_a_backbone_that_could_not_be_loaded_again_is_refused():
    model = narrow()
    model.backbone.fc = nn.Linear(64, 10, bias=False)
    with pytest.raises(ValueError, match=r"recipe 'resnet18' differ in tensors: backbone\.fc\.bias"):
        describe_pruning(model)
    model.backbone.fc = nn.Linear(64, 12)
    with pytest.raises(ValueError, match=r"fc\.weight'\] is \[12, 64\], larger than the dense"):
        model.save_pretrained("/nowhere")


CONV, BN = "backbone.layer1.0.conv1.weight", "backbone.layer1.0.bn1"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "pruning must be an object of 'shapes' and 'attrs'"),
        ({"shapes": {}}, "pruning must be an object of 'shapes' and 'attrs'"),
        ({"shapes": [], "attrs": {}}, r"pruning\.shapes must be an object"),
        ({"shapes": {"backbone.no": [1]}, "attrs": {}}, r"shapes\['backbone\.no'\]: the backbone has no such tensor"),
        ({"shapes": {"image_mean": [1]}, "attrs": {}}, r"shapes\['image_mean'\]: the backbone has no such tensor"),
        ({"shapes": {CONV: [16, 16, 3]}, "attrs": {}}, "has 3 dimensions, the dense backbone has 4"),
        ({"shapes": {CONV: 16}, "attrs": {}}, r"conv1\.weight'\] must be a list"),
        *(
            ({"shapes": {CONV: [size, 16, 3, 3]}, "attrs": {}}, r"conv1\.weight'\] must hold positive integers")
            for size in (0, -1, 1.0, 0.5, True, "8", None)
        ),
        ({"shapes": {CONV: [17, 16, 3, 3]}, "attrs": {}}, "larger than the dense backbone's"),
        ({"shapes": {CONV: [10**30, 16, 3, 3]}, "attrs": {}}, "larger than the dense backbone's"),
        (
            {"shapes": {}, "attrs": {"backbone.no": {"dim": 1}}},
            r"attrs\['backbone\.no'\]: the backbone has no such mod",
        ),
        ({"shapes": {}, "attrs": {BN: 3}}, r"bn1'\] must be an object"),
        *(
            ({"shapes": {}, "attrs": {BN: {name: 1}}}, rf"bn1'\]: '{name}' is not a size")
            for name in ("forward", "__class__", "training", "eps", "weight", "out_channels")
        ),
        ({"shapes": {}, "attrs": {BN: {"num_features": 17}}}, r"\['num_features'\] is 17, larger"),
        ({"shapes": {}, "attrs": {BN: {"num_features": True}}}, r"\['num_features'\] must hold positive integers"),
        ({"shapes": {}, "attrs": {BN: {"num_features": [4]}}}, r"\['num_features'\] must be an integer"),
    ],
)
def test_hostile_records_are_refused_and_change_nothing(record, message):
    model = narrow()
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        apply_pruning(model, record)
    assert describe_pruning(model) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("scale", [0.1, 1.5, float("nan"), float("inf"), -0.5, 1e308, 10**30, True, "1", None, [0.5]])
def test_a_scale_must_follow_from_a_smaller_head(scale):
    model = from_backbone("vit_tiny_patch16_224", num_labels=3, image_size=32, depth=1, embed_dim=24)
    with pytest.raises(ValueError, match=r"\['scale'\] must be a number in \[0\.35.*, 1\]"):
        apply_pruning(model, {"shapes": {}, "attrs": {"backbone.blocks.0.attn": {"scale": scale}}})


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"scale": 0.9}, r"\['scale'\] is 0\.9, but head_dim 8 needs 0\.35"),
        ({"head_dim": 4, "attn_dim": 12}, r"\['scale'\] is 0\.35.*, but head_dim 4 needs 0\.5"),
        ({"head_dim": 4, "attn_dim": 12, "scale": 5**-0.5}, r"\['scale'\] is 0\.44.*, but head_dim 4 needs 0\.5"),
    ],
)
def test_a_scale_that_the_heads_contradict_is_refused(attrs, message):
    model = from_backbone("vit_tiny_patch16_224", num_labels=3, image_size=32, depth=1, embed_dim=24)
    with pytest.raises(ValueError, match=message):
        apply_pruning(model, {"shapes": {}, "attrs": {"backbone.blocks.0.attn": attrs}})
    assert describe_pruning(model) is None


def test_a_record_that_leaves_a_network_that_cannot_run_is_refused(broken):
    folder = broken(config=lambda c: c["pruning"]["shapes"].update({CONV: [12, 16, 3, 3]}))
    with pytest.raises(
        ValueError, match=r"copy: config\.json: 'resnet18' cannot run at image_size 32 with this pruning record"
    ):
        from_pretrained(folder)
    folder = broken(config=lambda c: (c["pruning"]["shapes"].pop(CONV), c["pruning"]["shapes"].update({CONV[:9]: []})))
    with pytest.raises(ValueError, match=r"config\.json: pruning\.shapes\['backbone\.'\]"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_a_record_that_drops_classes_is_refused(broken):
    def drop(config):
        config["pruning"]["shapes"] |= {"backbone.fc.weight": [9, 64], "backbone.fc.bias": [9]}

    with pytest.raises(
        ValueError, match=r"config\.json: .* logits of shape \(1, 9\) for one image, but there are 10 labels"
    ):
        from_pretrained(broken(config=drop))


# --- saving and loading ------------------------------------------------------------------------------------------


def test_saving_refreshes_the_record_and_writes_everything_a_repository_needs(saved):
    model, folder, _, _ = saved
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "preprocessor_config.json", "model.safetensors", "modeling.py"}
    config = json.loads((folder / "config.json").read_text())
    assert config["pruning"] == describe_pruning(model)
    assert config["auto_map"] == {
        "AutoConfig": "modeling.PrunedConfig",
        "AutoModelForImageClassification": "modeling.PrunedForImageClassification",
    }
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 32, "width": 32}
    assert processor["do_normalize"] is False
    assert config["pruning"]["shapes"][CONV.replace("layer1", "layer2")] == [20, 16, 3, 3]


@pytest.mark.parametrize("kwargs", [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": torch.float32}])
def test_logits_are_bit_equal_after_loading(saved, kwargs):
    _, folder, images, logits = saved
    loaded = AutoModelForImageClassification.from_pretrained(folder, **kwargs)
    assert isinstance(loaded, PrunedForImageClassification) and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, logits)


@pytest.mark.parametrize("saved_by", ["model_type 'vit'", "timm"])
def test_a_model_that_another_class_saved_is_told_as_one_and_not_as_a_damaged_one(saved_by, tmp_path):
    ViTForImageClassification(ViTConfig(**TINY_VIT, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    if saved_by == "timm":
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny", "pretrained_cfg": {}}))
    told = f"this is a model of {saved_by}, and only saved models of this class are loaded .*: start from that one by"
    for load in (from_pretrained, PrunedConfig.from_pretrained):
        with pytest.raises(ValueError, match=told):
            load(tmp_path)


def test_loaded_weights_lie_where_an_allocator_puts_them(saved):
    # In the file most do not, and some kernels add in another order then: the last bits of logits would differ.
    def astray(tensors):
        return [tensor for tensor in tensors if tensor.data_ptr() % 64]

    assert astray(load_file(saved[1] / "model.safetensors").values())
    assert not astray(from_pretrained(saved[1]).state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_is_saved_and_loaded_whatever_dtype_is_the_default(saved, tmp_path, set_default_dtype, dtype):
    set_default_dtype(dtype)
    from_pretrained(saved[1]).save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in saved[0].state_dict().items())


def test_a_model_is_loaded_from_memory_as_strictly_as_from_files(saved):
    model, _, images, logits = saved
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = from_pretrained(None, config=copy.deepcopy(model.config), state_dict=dict(held))
    assert torch.equal(again(images).logits, logits)
    name = "backbone.fc.bias"
    for change, message in (
        ({name: None}, f"^state_dict lacks '{name}'"),
        ({"more": held[name]}, "^state_dict has the unknown tensor 'more'"),
        ({name: held[name][:3]}, rf"^state_dict holds '{name}' with shape \(3,\), but config.json says \(10,\)"),
        ({name: held[name] * float("nan")}, f"^state_dict holds NaN in '{name}'"),
        ({"image_mean": held["image_mean"] + 0.1}, r"^state_dict holds image_mean \[0\.5"),
    ):
        wrong = {key: tensor for key, tensor in (held | change).items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            from_pretrained(None, config=copy.deepcopy(model.config), state_dict=wrong)


def test_pruned_twice_sharded_and_saved_over_an_older_model(saved, tmp_path):
    model, images = copy.deepcopy(saved[0]), saved[2]
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    shrink_block(loaded.backbone.layer2[0], 9)
    shrink_block(loaded.backbone.layer4[0], 31)
    loaded.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    (tmp_path / "model.safetensors").unlink()
    again, info = from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and again.backbone.layer2[0].conv1.out_channels == 9
    assert torch.equal(again(images).logits, loaded(images).logits)
    assert describe_pruning(again) == describe_pruning(loaded)


@pytest.mark.parametrize(
    ("backbone", "kwargs"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2], "patch_size": 2, "window_size": 4},
        ),
        ("mobilevit_xxs", {}),
        (ViTConfig(**TINY_VIT), {}),
        (ResNetConfig(**TINY_RESNET), {"small_images": True}),
    ],
)
def test_buffers_and_weights_of_other_families_survive(backbone, kwargs, tmp_path):
    model = from_backbone(backbone, num_labels=3, image_size=32, **kwargs).eval()
    images = torch.rand(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    loaded = from_pretrained(tmp_path)
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), model.buffers(), strict=True))


def test_trained_weights_are_not_initialised_again(saved):
    model = copy.deepcopy(saved[0])
    model.init_weights()
    model.apply(model._initialize_weights)
    assert torch.equal(model(saved[2]).logits, saved[3])
    wrapped = from_backbone(ResNetConfig(**TINY_RESNET), num_labels=3, image_size=32)
    before = copy.deepcopy(wrapped.state_dict())
    for module in wrapped.modules():
        vars(module).pop("_is_hf_initialized", None)  # as on modules that something else has put in
    wrapped.init_weights()
    assert all(torch.equal(before[name], tensor) for name, tensor in wrapped.state_dict().items())


FC = "backbone.fc.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[FC].__setitem__((0, 0), float("nan")), rf"model\.safetensors holds NaN in '{FC}'"),
        (lambda t: t.pop(FC), rf"model\.safetensors lacks '{FC}'"),
        (lambda t: t.update(more=torch.zeros(1)), r"model\.safetensors has the unknown tensor 'more'"),
        (
            lambda t: t.update({FC: torch.zeros(10, 3)}),
            rf"holds '{FC}' with shape \(10, 3\), but config\.json says \(10, 64\)",
        ),
        (lambda t: t["image_mean"].add_(0.1), r"model\.safetensors holds image_mean .* config\.json \[0\.4, 0\.5"),
    ],
)
def test_a_weights_file_that_disagrees_is_refused(broken, change, message):
    folder = broken(tensors=change)
    with pytest.raises(ValueError, match=message) as refusal:
        from_pretrained(folder)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize("size", [0, 5, 3000])
def test_a_truncated_weights_file_is_refused_with_its_cause(broken, size):
    path = broken() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read") as refusal:
        AutoModelForImageClassification.from_pretrained(path.parent)
    assert type(refusal.value.__cause__).__name__ == "SafetensorError"


def test_a_damaged_shard_and_a_nan_in_a_shard_are_named(saved, tmp_path):
    saved[0].save_pretrained(tmp_path, max_shard_size="100KB")
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][FC]
    tensors = load_file(tmp_path / where)
    save_file(tensors | {FC: tensors[FC] * float("nan")}, tmp_path / where, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{where} holds NaN"):
        from_pretrained(tmp_path)
    (tmp_path / where).write_bytes((tmp_path / where).read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{where} cannot be read"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: {}, r"is no index of weights: KeyError\('weight_map'\)"),
        (lambda index: [], "is no index of weights"),
        (lambda index: index | {"weight_map": [1]}, "is no index of weights"),
        (lambda index: index | {"metadata": None}, "is no index of weights"),
        (lambda index: index | {"weight_map": {}}, r"lacks 'backbone\."),
        *(
            (lambda index, name=name: index | {"weight_map": index["weight_map"] | {FC: name}}, rf"names .*{name}'?,")
            for name in ("evil.bin", "../outside.safetensors", "/outside.safetensors", 3)
        ),
    ],
)
def test_an_index_of_shards_that_is_none_or_leads_elsewhere_is_refused(saved, tmp_path, change, message):
    folder = tmp_path / "sharded"
    saved[0].save_pretrained(folder, max_shard_size="100KB")
    shutil.copy(saved[1] / "model.safetensors", tmp_path / "outside.safetensors")
    torch.save({FC: torch.zeros(1)}, folder / "evil.bin")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"sharded: model\.safetensors\.index\.json .*" + message.removeprefix("is ")):
        AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("content", ["3", "null", '"x"', "{", "[]", "{}"])
def test_a_config_that_is_no_object_is_refused(broken, content):
    folder = broken()
    (folder / "config.json").write_text(content)
    # Older transformers take an empty object for a configuration with defaults, which the weights do not fit.
    with pytest.raises((ValueError, OSError), match=r"config\.json|model\.safetensors lacks"):
        from_pretrained(folder)


def test_a_model_from_a_folder_says_nothing_of_it(saved, tmp_path):
    loaded = from_pretrained(saved[1])
    loaded.save_pretrained(tmp_path)
    source = ResNetForImageClassification(ResNetConfig(**TINY_RESNET))
    source.save_pretrained(tmp_path / "source")
    ConvNextImageProcessor().save_pretrained(tmp_path / "source")
    from_backbone(str(tmp_path / "source"), image_size=32).save_pretrained(tmp_path / "copy")
    for path in tmp_path.rglob("*.json"):
        assert str(saved[1]) not in path.read_text() and str(tmp_path) not in path.read_text(), path


def test_missing_files_are_os_errors_and_pickles_are_not_read(broken):
    folder = broken()
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=r"holds no config\.json"):
        from_pretrained(folder)
    with pytest.raises(OSError, match="no_such_folder"):
        from_pretrained(folder / "no_such_folder")


def test_loading_is_strict_even_on_request(saved):
    with pytest.raises(ValueError, match="load strictly; load it .* by hf_mrpf.with_new_head"):
        from_pretrained(saved[1], num_labels=3, ignore_mismatched_sizes=True)
    config = PrunedConfig.from_pretrained(saved[1])
    config.num_labels = 3
    with pytest.raises(ValueError, match=r"config\.json says \(3,\)"):
        from_pretrained(saved[1], config=config)


@pytest.mark.parametrize("number", [2, 0, True, "1"])
def test_a_checkpoint_of_a_newer_version_is_refused_with_what_to_do(tmp_path, number):
    PrunedConfig().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["mrpf_format"] == 1
    (tmp_path / "config.json").write_text(json.dumps(content | {"mrpf_format": number}))
    with pytest.raises(ValueError, match=r"config.json: mrpf_format is .*Update hf_mrpf, or load with trust"):
        PrunedConfig.from_pretrained(tmp_path)
