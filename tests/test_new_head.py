"""A trained model with other classes: everything but the head stays, pruned or not, and it loads again."""

import dataclasses

import pytest
import torch
from test_modeling import NARROW, TINY_RESNET, from_backbone, from_pretrained, randomise
from transformers import AutoModelForImageClassification, ResNetConfig

import hf_mrpf
from hf_mrpf import plan_pruning, prune
from hf_mrpf.cli import ModelArguments
from hf_mrpf.data import load_image_data
from hf_mrpf.modeling import describe_pruning, with_new_head
from hf_mrpf.starting_point import build_model

LABELS = {0: "cat", 1: "dog", 2: "emu", 3: "fox"}


@pytest.fixture(params=["timm", "transformers", "vgg"])
def pruned(request):
    backbone, kwargs = {
        "timm": ("resnet18", NARROW | {"small_images": True}),
        "transformers": (ResNetConfig(**TINY_RESNET), {}),
        "vgg": ("vgg11", {"small_images": True}),
    }[request.param]
    model = randomise(
        from_backbone(backbone, num_labels=10, image_size=32, image_mean=[0.4, 0.5, 0.6], **kwargs)
    ).eval()
    images = torch.rand(2, 3, 32, 32)
    prune(model, plan_pruning(model, images[:1], target=0.6, allocation="uniform"))
    return model.eval()


def test_what_was_frozen_stays_so_but_for_the_head(pruned):
    first = next(iter(dict(pruned.named_parameters())))
    pruned.requires_grad_(False).get_parameter(first).requires_grad_(True)
    other = with_new_head(pruned, LABELS)
    trained = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    head = {name for name, parameter in other.named_parameters() if parameter.shape != pruned.get_parameter(name).shape}
    assert len(head) == 2 and trained == head | {first}


def test_all_but_the_head_is_copied_and_the_pruning_stays(pruned, tmp_path):
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    other = with_new_head(pruned, LABELS)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert other(images).logits.shape == (2, 4)
        assert pruned(images).logits.shape == (2, 10)
    after = other.state_dict()
    head = {name for name in after if after[name].shape != before[name].shape}
    assert len(head) == 2 and {after[name].shape[0] for name in head} == {4}
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - head)
    assert not any(torch.equal(after[name], before[name][:4]) for name in head)
    assert other.config.id2label == LABELS and other.config.label2id["fox"] == 3
    assert other.config.image_mean == pruned.config.image_mean
    assert pruned.config.num_labels == 10 and torch.equal(
        pruned.state_dict()[next(iter(before))], before[next(iter(before))]
    )

    record = describe_pruning(other)
    assert record["attrs"] == describe_pruning(pruned)["attrs"]
    other.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(images).logits, other(images).logits)


def test_a_dense_model_and_the_same_number_of_classes():
    model = from_backbone("resnet18", num_labels=10, image_size=32, small_images=True, **NARROW)
    assert describe_pruning(with_new_head(model, LABELS)) is None
    with pytest.raises(ValueError, match="the model has 10 classes already"):
        with_new_head(model, {index: str(index) for index in range(10)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_all_but_the_head_keeps_its_dtype_and_its_digits(dtype):
    model = from_backbone("resnet18", num_labels=10, image_size=32, small_images=True, **NARROW).to(dtype)
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone.") and tensor.is_floating_point():
            tensor.uniform_()
    model.backbone.bn1.float()
    before, other = model.state_dict(), with_new_head(model, LABELS)
    assert other.dtype == other.backbone.fc.weight.dtype == dtype
    assert other.image_mean.dtype == other.backbone.bn1.weight.dtype == torch.float32
    for name, tensor in other.state_dict().items():
        if not name.startswith("backbone.fc."):
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
            assert tensor.data_ptr() != before[name].data_ptr()


def test_every_way_to_other_classes_leads_to_a_new_head(tmp_path):
    assert hf_mrpf.with_new_head is with_new_head and "with_new_head" in hf_mrpf.__all__
    model = from_backbone("resnet18", num_labels=10, image_size=32, small_images=True, **NARROW)
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    model.save_pretrained(dense)
    prune(model, plan_pruning(model, torch.rand(1, 3, 32, 32), target=0.6, allocation="uniform"))
    model.save_pretrained(pruned)
    for folder in (dense, pruned):
        for load in (from_pretrained, AutoModelForImageClassification.from_pretrained):
            for options in (
                {"num_labels": 7},
                {"id2label": LABELS},
                {"num_labels": 7, "ignore_mismatched_sizes": True},
            ):
                with pytest.raises(
                    ValueError, match=r"give it a new head by hf_mrpf\.with_new_head\(model, id2label\)"
                ):
                    load(folder, **options)
            assert load(folder, id2label={i: f"c{i}" for i in range(10)}, num_labels=10).config.id2label[3] == "c3"
        with pytest.raises(ValueError, match=r"from_pretrained \(for .* by hf_mrpf\.with_new_head"):
            from_backbone(str(folder), num_labels=7)
    assert with_new_head(model, ["a", "b"]).config.id2label == {0: "a", 1: "b"}
    for wrong, message in (({1: "a", 2: "b"}, "from 0 to 1"), (3, "a list or a dict")):
        with pytest.raises(ValueError, match=message):
            with_new_head(model, wrong)
    with pytest.raises(ValueError, match="model is a Linear; a PrunedForImageClassification is needed"):
        with_new_head(torch.nn.Linear(2, 2), LABELS)


def test_the_command_line_gives_a_named_model_the_classes_of_the_data(tmp_path):
    data = load_image_data("digits", max_train_samples=40, max_eval_samples=10)
    model = from_backbone("resnet18", id2label=LABELS, image_size=16, small_images=True, **NARROW)
    model.save_pretrained(tmp_path)
    built = build_model(ModelArguments(model_name_or_path=str(tmp_path)), data)
    assert list(built.config.id2label.values()) == data.class_names
    assert torch.equal(built.backbone.conv1.weight, model.backbone.conv1.weight)
    few = dataclasses.replace(data, class_names=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="class 0 is .* for the model and 'a' in the data set: give the data set that"):
        build_model(ModelArguments(model_name_or_path=str(tmp_path)), few)
