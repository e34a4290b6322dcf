"""Closed-form repair against a naive least-squares fit, and BatchNorm statistics against their definition."""

import copy
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from pruning_reference import ConcatFlatten, mobilenet, narrow_resnet
from torch import nn

from hf_mrpf import recalibrate_batchnorm, repair
from hf_mrpf.attacks import AttackConfig, logits_of
from hf_mrpf.compression import compress
from hf_mrpf.pruning import plan_pruning, prune

ATTACK = AttackConfig(eps=0.1, num_steps=2)


@pytest.fixture(scope="module")
def trained():
    """A narrow ResNet trained for a moment on four classes of noisy colour stripes."""
    torch.manual_seed(0)
    model = narrow_resnet().train()
    labels = torch.arange(256) % 4
    images = 0.3 * torch.rand(256, 3, 32, 32)
    for i, label in enumerate(labels.tolist()):
        images[i, label % 3, (8 * label) : (8 * label + 8)] += 0.5
    images = images.clamp(0, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(24):
        chunk = slice(64 * (step % 4), 64 * (step % 4) + 64)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chunk]), labels[chunk]).backward()
        optimizer.step()
    batches = [(images[i : i + 64], labels[i : i + 64]) for i in (0, 64)]
    return recalibrate_batchnorm(model, batches).eval(), batches


def pruned_copy(model, images, **options):
    plan = plan_pruning(model, images, **{"allocation": "uniform", "target": 0.4} | options)
    return prune(copy.deepcopy(model), plan), plan


def inputs_of(model, name, images):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


def test_a_convolution_and_a_linear_layer_equal_the_naive_least_squares_fit():
    dense = ConcatFlatten().double().eval()
    images, labels = torch.rand(400, 3, 8, 8, dtype=torch.float64), torch.zeros(400, dtype=torch.long)
    pruned, plan = pruned_copy(dense, images)
    report = repair(
        pruned, dense, plan, [(images[:250], labels[:250]), (images[250:], labels[250:])], None, damping=1e-12
    )
    assert set(report.errors) == {"mix", "hidden", "classes"} and report.left == {}
    for name in ("mix", "classes"):
        layer, features = dense.get_submodule(name), inputs_of(dense, name, images)
        if name == "mix":
            channels = plan.kept["left"] + [8 + channel for channel in plan.kept["right"]]
            rows = F.unfold(features[:, channels], 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
            wanted = layer(features).permute(0, 2, 3, 1).flatten(0, 2)[:, plan.kept["mix"]]
        else:
            rows, wanted = features[:, plan.kept["hidden"]], layer(features)
        rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
        best = rows @ torch.linalg.lstsq(rows, wanted, driver="gelsd").solution
        new = pruned.get_submodule(name)
        ours = rows @ torch.cat([new.weight.flatten(1), new.bias[:, None]], 1).T
        torch.testing.assert_close(ours, best, rtol=0, atol=1e-6)
        error = (best - wanted).square().sum() / wanted.square().sum()
        assert report.errors[name][1] == pytest.approx(error.item(), rel=1e-4)


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8)
        self.second, self.classes = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, images):
        hidden = self.second(input=self.norm(input=self.first(input=images)).relu()).relu()
        return self.classes(input=hidden.mean((2, 3)))


class ByPosition(ByName):
    def forward(self, images):
        return self.classes(self.second(self.norm(self.first(images)).relu()).relu().mean((2, 3)))


def test_layers_that_are_called_by_the_name_of_their_argument_are_planned_and_repaired_alike():
    images, labels = torch.rand(20, 3, 8, 8), torch.zeros(20, dtype=torch.long)
    repaired = []
    for kind in (ByName, ByPosition):
        torch.manual_seed(0)
        dense = kind().eval()
        pruned, plan = pruned_copy(dense, images)
        assert set(repair(pruned, dense, plan, [(images, labels)], ATTACK).errors) == {"second", "classes"}
        repaired.append(pruned(images))
    assert torch.equal(*repaired)


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0, 100.0])
def test_no_layer_gets_worse_at_any_damping_and_errors_are_the_measured_ones(damping):
    dense = ConcatFlatten().eval()
    images, labels = torch.rand(40, 3, 8, 8), torch.zeros(40, dtype=torch.long)
    pruned, plan = pruned_copy(dense, images)
    before = copy.deepcopy(pruned)
    report = repair(pruned, dense, plan, [(images, labels)], None, damping=damping)
    assert all(after <= before for before, after in report.errors.values())
    features = inputs_of(dense, "classes", images)
    wanted = dense.classes(features)
    for model, expected in zip((before, pruned), report.errors["classes"], strict=True):
        error = (model.classes(features[:, plan.kept["hidden"]]) - wanted).square().sum() / wanted.square().sum()
        assert error.item() == pytest.approx(expected, rel=1e-3)


def test_nothing_changes_where_nothing_was_lost():
    dense = ConcatFlatten().eval()
    images = torch.rand(20, 3, 8, 8)
    pruned, plan = pruned_copy(dense, images, target=0.95, ignore=["left", "right", "mix"])
    report = repair(pruned, dense, plan, [(images, torch.zeros(20, dtype=torch.long))], None)
    assert set(report.errors) == {"classes"}
    assert torch.equal(pruned.mix.weight, dense.mix.weight)
    assert torch.equal(pruned.hidden.weight, dense.hidden.weight[plan.kept["hidden"]])


def test_repair_brings_a_trained_network_nearer_to_the_dense_one(trained):
    dense, batches = trained
    pruned, plan = pruned_copy(dense, batches[0][0])
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}

    def distance(model):
        with torch.no_grad():
            return sum((model(images) - dense(images)).square().mean().item() for images, _ in batches)

    def recalibrated(model):
        return distance(recalibrate_batchnorm(copy.deepcopy(model), batches))

    removed = distance(pruned), recalibrated(pruned)
    repair(pruned, dense, plan, batches, ATTACK)
    repaired = distance(pruned), recalibrated(pruned)
    assert repaired[0] < 0.7 * removed[0] and repaired[1] < 0.7 * removed[1]
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.state_dict().items())
    assert not any(module._forward_pre_hooks for module in dense.modules())


def test_adversarial_images_count(trained):
    dense, batches = trained
    first, plan = pruned_copy(dense, batches[0][0])
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    repair(first, dense, plan, batches, ATTACK, seed=1)
    repair(second, dense, plan, batches, ATTACK, seed=1)
    repair(third, dense, plan, batches, None)
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert not torch.allclose(first.fc.weight, third.fc.weight, atol=1e-6)


@pytest.mark.slow
def test_layers_that_cannot_be_refitted_are_named(monkeypatch):
    dense = mobilenet().eval()
    images = torch.rand(2, 3, 64, 64)
    pruned, plan = pruned_copy(dense, images, target=0.5)
    monkeypatch.setattr(import_module("hf_mrpf.repair"), "MAX_INPUTS", 500)
    report = repair(pruned, dense, plan, [(images, torch.zeros(2, dtype=torch.long))], None)
    assert report.left["blocks.1.0.conv_dw"] == "depthwise: it mixes no channels"
    assert report.left["classifier"] == "1,024 inputs are more than 500"
    assert "blocks.1.0.conv_pwl" in report.errors


def test_other_padding_is_left():
    dense = ConcatFlatten().eval()
    dense.mix.padding_mode = "reflect"
    images = torch.rand(4, 3, 8, 8)
    pruned, plan = pruned_copy(dense, images)
    report = repair(pruned, dense, plan, [(images, torch.zeros(4, dtype=torch.long))], None)
    assert report.left == {"mix": "padding that is not a fixed number of zeros"}


def test_wrong_models_dampings_and_empty_batches_are_refused():
    dense = ConcatFlatten()
    images = torch.rand(2, 3, 8, 8)
    pruned, plan = pruned_copy(dense, images)
    batches = [(images, torch.zeros(2, dtype=torch.long))]
    for damping in (0, -1.0, True, float("inf")):
        with pytest.raises(ValueError, match="damping is .*; a positive number is needed"):
            repair(pruned, dense, plan, batches, None, damping=damping)
    with pytest.raises(ValueError, match="batches are empty; the repair needs calibration images"):
        repair(pruned, dense, plan, [], None)
    with pytest.raises(ValueError, match=r"layer 'left' of the pruned model is \[8, 3, 3, 3\], and .* by the plan"):
        repair(dense, dense, plan, batches, None)


def test_recalibrated_statistics_are_means_over_batches():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2))
    model[1].eval()
    batches = [(torch.rand(8, 3, 4, 4), torch.zeros(8)), (torch.rand(8, 3, 4, 4), torch.zeros(8))]
    weight = model[0].weight.clone()
    assert recalibrate_batchnorm(model, batches) is model
    features = [model[0](images).detach().transpose(0, 1).flatten(1) for images, _ in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([f.mean(1) for f in features]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([f.var(1) for f in features]).mean(0))
    assert [module.training for module in model] == [True, False, True, True, True]
    assert model[1].momentum == 0.1 and torch.equal(model[0].weight, weight)


def test_recalibration_needs_images_and_norms_that_keep_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model(torch.rand(2, 3, 4, 4))
    statistics = model[1].running_mean.clone()
    with pytest.raises(ValueError, match="batches are empty"):
        recalibrate_batchnorm(model, [])
    assert torch.equal(model[1].running_mean, statistics)
    plain = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert recalibrate_batchnorm(plain, []) is plain


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.full((2, 3, 4, 4), 200, dtype=torch.uint8), "torch.uint8; .*divide them by 255"),
        ((torch.full((2, 3, 4, 4), 200.0), torch.zeros(2)), r"from 200 to 200; they must stay in \[0, 1\]"),
        (torch.full((2, 3, 4, 4), -1.5), "the model normalises them itself"),
        (torch.full((2, 3, 4, 4), 1.5, dtype=torch.bfloat16), r"from 1.5 to 1.5; they must stay in \[0, 1\]"),
        ({"pixel_values": torch.rand(2, 3, 4, 4)}, r"batches holds a dict; .*a pair \(images, labels\)"),
        ([], "batches holds a list"),
    ],
)
def test_recalibration_refuses_what_are_no_pixels_and_changes_nothing(batch, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model(torch.rand(2, 3, 4, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        recalibrate_batchnorm(model, [torch.rand(2, 3, 4, 4), batch])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].momentum == 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_half_precision_is_recalibrated_on_images_of_its_own(dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(dtype)
    images = torch.rand(8, 3, 4, 4).to(dtype)
    recalibrate_batchnorm(model, [images])
    torch.testing.assert_close(model[1].running_mean, model[0](images).detach().mean((0, 2, 3)), rtol=0.02, atol=0.01)


def test_a_batch_of_one_image_for_small_maps_changes_nothing_and_is_refused():
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 12),
        nn.BatchNorm1d(12), nn.Linear(12, 4),
    )  # fmt: skip
    model(torch.rand(4, 3, 8, 8))
    before = copy.deepcopy(model.state_dict())
    one = (torch.rand(1, 3, 8, 8), torch.tensor([0]))
    for work in (
        lambda: recalibrate_batchnorm(model, [torch.rand(2, 3, 8, 8), one]),
        lambda: compress(model, [one], 0.5, attack=ATTACK, allocation="uniform"),
    ):
        with pytest.raises(ValueError, match=r"batch \d of batches has 1 image, which gives a BatchNorm"):
            work()
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model[1].momentum == model[5].momentum == 0.1


def test_compress_does_it_all_and_reports_every_step(trained):
    dense, batches = trained
    model = copy.deepcopy(dense)
    plan, report = compress(model, batches, 0.5, attack=ATTACK)
    assert plan.achieved["macs"] == pytest.approx(0.5, rel=0.01) and len(plan.scores) == len(plan.units)
    assert list(report.accuracy) == ["dense", "pruned", "repaired", "recalibrated"]
    images, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    with torch.no_grad():
        for name, net in (("dense", dense), ("recalibrated", model)):
            clean = (logits_of(net(images)).argmax(1) == labels).double().mean().item()
            assert report.accuracy[name]["clean"] == pytest.approx(clean)
            assert 0 <= report.accuracy[name]["robust"] <= clean + 0.02
    assert report.repair.errors


def test_compress_gives_what_its_steps_give(trained):
    dense, batches = trained
    model, by_hand = copy.deepcopy(dense), copy.deepcopy(dense)
    plan, _ = compress(model, batches, 0.5, attack=ATTACK, seed=3, allocation="uniform")
    repair(prune(by_hand, plan), dense, plan, batches, ATTACK, seed=3)
    recalibrate_batchnorm(by_hand, batches)
    torch.testing.assert_close(model.state_dict(), by_hand.state_dict())


def test_compress_names_what_is_no_calibration_set():
    model, images, labels = narrow_resnet(), torch.rand(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
    for batches, message in [
        ([], "batches is empty"),
        ((images, labels), r"batches holds a Tensor; each entry must be a pair \(images, labels\)"),
        ([(images, labels), (images[:0], labels[:0])], "a set without images"),
        ([(images * 255, labels)], r"must stay in \[0, 1\]"),
        ([(images, labels.tolist())], "labels are list for images of shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            compress(model, batches, 0.5, attack=ATTACK, allocation="uniform")
