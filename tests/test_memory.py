"""What training and scoring hold in memory, counted in bytes of tensors."""

import contextlib
import copy
import gc
import weakref
from unittest.mock import patch

import pytest
import torch
from torch.profiler import record_function
from transformers import MobileViTConfig, ViTConfig

from benchmarks.memory import NETS, tensor_bytes, train
from hf_mrpf import (
    AttackConfig,
    PrunedForImageClassification,
    attacks,
    module_robustness_sensitivity,
    objectives,
    pgd_attack,
)

# transformers renames these from 5.23 on, and the oldest supported one has no other names.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*deprecated:FutureWarning")

ATTACK = AttackConfig(num_steps=4)
SMALL_RESNET = {"layers": (2, 2, 2, 2), "channels": (16, 16, 16, 16)}  # behind a stem of 64 channels
TINY_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}


def resnet(**kwargs):
    return PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, **{**SMALL_RESNET, **kwargs}
    )


NARROW = {
    "resnet": lambda: resnet(layers=(1, 1, 1, 1)),
    "vit": lambda: PrunedForImageClassification.from_backbone(
        ViTConfig(image_size=16, patch_size=4, **{**TINY_VIT, "num_hidden_layers": 1}), num_labels=10
    ),
}


def batch(size, image_size=16):
    return torch.rand(size, 3, image_size, image_size), torch.randint(0, 10, (size,))


def peak(work):
    return tensor_bytes(work)[0]


def test_the_counter_counts_what_lives_at_once():
    kept = []

    def work():
        kept.append(torch.empty(1000, dtype=torch.uint8))
        for _ in range(3):
            torch.empty(5000, dtype=torch.uint8)
        with record_function("step 1"):
            pass
        kept.append(torch.empty(300, dtype=torch.uint8))

    assert tensor_bytes(work) == (6000, {"step 1": (1000, 6000)})


# ---- The attack ------------------------------------------------------------------------------------------------------


def hoarding_attack(model, images, labels, attack, *, loss="ce", start=None):
    """`pgd_attack` as it must not be: the graph of every step stays."""
    adversarial, graphs = images.clone(), []
    for _ in range(attack.num_steps):
        adversarial = adversarial.detach().requires_grad_()
        value = attacks.LOSSES[loss](attacks.logits_of(model(adversarial)), labels)
        (gradient,) = torch.autograd.grad(value, adversarial, retain_graph=True)
        graphs.append(value)
        adversarial = (adversarial + attack.step * gradient.sign()).clamp(0, 1)
    return adversarial.detach()


@pytest.mark.parametrize("net", [pytest.param("resnet", marks=pytest.mark.slow), "checkpointed", "vit"])
def test_an_attack_keeps_no_graph_beyond_a_step(net):
    """Nor its activations: five steps take what one takes, and nothing stays but the images."""
    model = NARROW["vit" if net == "vit" else "resnet"]()
    if net == "checkpointed":
        model.gradient_checkpointing_enable()
    images, labels = batch(4)

    def peak_of(attack, steps):
        return peak(lambda: attack(model.eval(), images, labels, AttackConfig(num_steps=steps)))

    one, five = peak_of(pgd_attack, 1), peak_of(pgd_attack, 5)
    assert five <= 1.01 * one + images.nbytes
    assert peak_of(hoarding_attack, 5) > 2 * peak_of(hoarding_attack, 1)

    kept = []

    def work():
        kept.append(pgd_attack(model, images, labels, ATTACK))
        with record_function("step end"):
            pass

    held, _ = tensor_bytes(work)[1]["step end"]
    assert held <= images.nbytes + 64
    assert kept[0].grad_fn is None and kept[0].grad is None


def test_only_the_newest_graph_is_alive_within_an_attack():
    """Every step's logits and graph are gone when the next forward starts."""
    model, (images, labels) = resnet().eval(), batch(4)
    alive: list[int] = []
    outputs: list[weakref.ref] = []

    def count(module, inputs):
        alive.append(sum(output() is not None for output in outputs))

    def remember(module, inputs, output):
        outputs.append(weakref.ref(output))

    first = model.backbone.layer1[0]
    first.register_forward_pre_hook(count)
    first.register_forward_hook(remember)
    pgd_attack(model, images, labels, ATTACK)
    assert alive == [0] * (1 + ATTACK.num_steps)  # the first pass, of one image, is to know what can be folded
    alive.clear(), outputs.clear()
    hoarding_attack(model, images, labels, ATTACK)
    assert max(alive) > 0


# ---- Training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fine_tune():
    """Peak of the plain Trainer, of which weights with their momentum; a ResNet-18 in depth and in its first width."""
    NETS["wide"] = lambda: resnet(channels=(64, 64, 64, 64))
    yield (
        peak(lambda: train("wide", "fine-tune", 8, "cpu")),
        2 * sum(parameter.nbytes for parameter in NETS["wide"]().parameters()),
    )
    del NETS["wide"]


@pytest.mark.parametrize(
    ("objective", "settings", "most", "graphs"),
    [
        pytest.param("standard", {}, 1.3, 1.05, marks=pytest.mark.slow),
        ("pgd", {}, 1.3, 1.05),
        ("trades", {}, 2.2, 2.05),
        ("trades", {"gradient_checkpointing": True}, 1.3, 1.3),
    ],
)
def test_training_takes_little_more_than_the_plain_trainer(fine_tune, objective, settings, most, graphs):
    """And no graph more than it needs, counted in those of the plain Trainer; TRADES needs two."""
    plain, weights = fine_tune
    taken = peak(lambda: train("wide", objective, 8, "cpu", **settings))
    assert taken <= most * plain
    assert taken - weights <= graphs * (plain - weights)


def test_no_step_of_training_takes_more_than_an_early_one():
    """Neither while it runs, nor afterwards: the twelfth step takes what the third takes, to the byte."""
    _, marks = tensor_bytes(lambda: train("toy", "trades", 4, "cpu", num_steps=1, max_steps=12))
    assert marks["step 12"] == marks["step 3"] == marks["step 7"]


def test_a_leak_of_one_small_tensor_per_step_would_be_seen(monkeypatch):
    leaked = []

    def leaking(*args, **kwargs):
        output = objectives.standard(*args, **kwargs)
        leaked.append(output.logits.detach())
        return output

    monkeypatch.setitem(objectives.OBJECTIVES, "standard", leaking)
    _, marks = tensor_bytes(lambda: train("toy", "standard", 4, "cpu", max_steps=6))
    assert marks["step 6"][0] - marks["step 3"][0] == 3 * leaked[0].nbytes


@pytest.mark.parametrize(
    ("method", "net"),
    [
        ("ascent", "resnet"),
        ("first_order", "vit"),
        pytest.param("ascent", "vit", marks=pytest.mark.slow),
        pytest.param("first_order", "resnet", marks=pytest.mark.slow),
    ],
)
def test_mrs_takes_little_more_than_a_forward_and_backward_at_its_batch(method, net):
    """Model included; a set in two parts alike. Passes are tried on two single images, which are among few images."""
    size = 8 if net == "resnet" else 4
    images, labels = batch(2 * size)

    def step():
        NARROW[net]().eval()(images[:size], labels=labels[:size]).loss.backward()

    def score(count):
        steps = {"num_steps": 2} if method == "ascent" else {}
        sets = [(images[:count], labels[:count])]
        module_robustness_sensitivity(NARROW[net](), sets, ATTACK, method=method, batch_size=size, **steps)

    allowed = 1.5 * peak(step)
    assert peak(lambda: score(size)) <= allowed
    assert peak(lambda: score(2 * size)) <= allowed + 2 * images.nbytes


# ---- Gradient checkpointing ------------------------------------------------------------------------------------------

CHECKPOINTED = {
    "timm resnet": lambda: resnet(drop_path_rate=0.2, drop_rate=0.2),
    # Its blocks end in a BatchNorm: there a recomputation stops within one.
    "timm mobilenet": lambda: PrunedForImageClassification.from_backbone(
        "timm/mobilenetv2_050", num_labels=10, image_size=32
    ),
    "timm vit": lambda: PrunedForImageClassification.from_backbone(
        "timm/vit_tiny_patch16_224",
        num_labels=10,
        image_size=16,
        patch_size=4,
        embed_dim=32,
        depth=4,
        drop_rate=0.2,
        num_heads=2,
    ),
    "transformers vit": lambda: PrunedForImageClassification.from_backbone(
        ViTConfig(image_size=16, patch_size=4, hidden_dropout_prob=0.2, **TINY_VIT), num_labels=10
    ),
    "transformers mobilevit": lambda: PrunedForImageClassification.from_backbone(
        MobileViTConfig(
            image_size=32, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16], num_attention_heads=2
        ),
        num_labels=10,
    ),
}


def trades_step(model, images, labels):
    torch.manual_seed(1)
    objectives.trades(model, images, labels, AttackConfig(num_steps=1)).loss.backward()


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_changes_neither_gradients_nor_statistics(name):
    """With dropout, on both forwards of TRADES; and after it is off again, all is as it was."""
    plain = CHECKPOINTED[name]().train()
    checked = copy.deepcopy(plain)
    checked.gradient_checkpointing_enable()
    twin, size = copy.deepcopy(checked), plain.config.image_size
    images, labels = batch(4, size)
    # Hooks of checkpointing are on BatchNorm, which is then not folded: attacks would differ by rounding.
    with patch("hf_mrpf.attacks.folded_batchnorm", lambda *_: contextlib.nullcontext()):
        for model in (plain, checked, twin):
            trades_step(model, images, labels)
    assert sum(parameter.grad.norm() for parameter in plain.parameters()) > 0
    for model in (checked, twin):
        for (key, a), (_, b) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), key
        for (key, a), (_, b) in zip(plain.named_buffers(), model.named_buffers(), strict=True):
            assert torch.equal(a, b), key
        assert model.state_dict().keys() == plain.state_dict().keys()
    checked.gradient_checkpointing_disable()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in checked.modules())


def test_statistics_stay_the_buffers_of_their_module():
    """Their addresses do not change: an optimizer of averages or DDP may hold them."""
    model = resnet().train()
    model.gradient_checkpointing_enable()
    before = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    trades_step(model, *batch(4))
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == before
    assert all(int(buffer) == 2 for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize("name", ["timm resnet", pytest.param("timm vit", marks=pytest.mark.slow), "transformers vit"])
def test_checkpointing_reaches_the_blocks(name):
    """A training graph of four to eight blocks takes well under what it takes without."""
    model = (resnet(channels=(64, 64, 64, 64)) if name == "timm resnet" else CHECKPOINTED[name]()).train()
    images, labels = batch(16, model.config.image_size)

    def step():
        model(images, labels=labels).loss.backward()

    step()  # the gradients exist from here on
    plain = peak(step)
    model.gradient_checkpointing_enable()
    assert peak(step) < 0.75 * plain


def test_a_graph_ends_with_its_step():
    """Nothing of the model or the trainer holds on to a loss: after a step only gradients are new."""
    model = resnet().train()
    images, labels = batch(8)
    gradients = sum(parameter.nbytes for parameter in model.parameters())

    def work():
        trades_step(model, images, labels)
        gc.collect()
        with record_function("step end"):
            pass

    held, _ = tensor_bytes(work)[1]["step end"]
    assert held <= gradients + 1024
