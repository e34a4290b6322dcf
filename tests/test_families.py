"""Every supported family: a pruned network equals its masked original, meets its target, trains, and loads again."""

import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import transformers
from pruning_reference import check_against_masked, check_family, randomise
from torch import nn

from hf_mrpf import architectures
from hf_mrpf.architectures import ATTENTIONS, class_id, known_layers, register_attention
from hf_mrpf.attacks import AttackConfig
from hf_mrpf.efficiency import count_macs, count_parameters
from hf_mrpf.model_card import PlanSummary
from hf_mrpf.modeling import PrunedForImageClassification
from hf_mrpf.plan import PruningPlan
from hf_mrpf.pruning import plan_pruning, prune
from hf_mrpf.repair import repair
from hf_mrpf.sensitivity import module_robustness_sensitivity
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


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


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


# Pruned with the slow tests. Those of transformers are pruned here, and EfficientNet and ResNeXt,
# which have the layers of MobileNetV3 and RegNet.
LONG = {"timm MobileViT", "timm MobileViTV2", "timm MobileNetV3", "timm RegNet"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in FAST])
def test_a_pruned_network_equals_its_masked_original(name):
    _, size, _ = FAST[name]
    check_family(lambda: network(FAST[name]), size, targets=(0.5,), rounds=0, tolerance=0.02, min_channels=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_so_it_does_at_other_targets_and_pruned_three_times(name):
    _, size, _ = FAST[name]
    check_family(lambda: network(FAST[name]), size, targets=(0.3, 0.7), rounds=3, tolerance=0.02, min_channels=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_pruned_network_equals_its_masked_original_and_takes_seconds(name):
    family = WHOLE[name]
    model, images = network(family), torch.rand(1, 3, family[1], family[1])
    start = time.process_time()  # of all threads, whatever else the machine does: 10 s on two cores
    prune(model, plan_pruning(model, images, allocation="uniform", target=0.5))
    assert time.process_time() - start < 20
    check_family(lambda: network(family), family[1], targets=(0.3, 0.5, 0.7), rounds=3, tolerance=0.02)


LOAD = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
import hf_mrpf
from transformers import AutoModelForImageClassification
differences = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    saved = torch.load(folder / "logits.pt", weights_only=True)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        differences[folder.name] = (model(saved["images"]).logits - saved["logits"]).abs().max().item()
print(json.dumps(differences))
"""


@pytest.mark.slow
def test_pruned_networks_load_again_bit_for_bit_in_a_fresh_process(tmp_path):
    for name, family in FAST.items():
        model, folder = wrapped(family).eval(), tmp_path / name
        images = torch.rand(2, 3, family[1], family[1])
        prune(model, plan_pruning(model, images, allocation="uniform", importance="random", target=0.6, min_channels=2))
        model.save_pretrained(folder)
        with torch.no_grad():
            torch.save({"images": images, "logits": model(images).logits}, folder / "logits.pt")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(FAST, 0.0)


@pytest.mark.parametrize("name", ["timm ViT", "transformers Swin", slow("timm MobileViT"), "timm ResNeXt"])
def test_what_loads_can_be_pruned_again_and_the_plan_says_so(name, tmp_path):
    model = wrapped(FAST[name]).eval()
    dense = {
        "macs": count_macs(model, torch.rand(1, 3, FAST[name][1], FAST[name][1])),
        "params": count_parameters(model),
    }
    images = torch.rand(2, 3, FAST[name][1], FAST[name][1])
    first = plan_pruning(model, images, allocation="uniform", target=0.7, min_channels=2)
    prune(model, first).save_pretrained(tmp_path)
    loaded = PrunedForImageClassification.from_pretrained(tmp_path).eval()
    again = plan_pruning(loaded, images, allocation="uniform", target=0.7, min_channels=2)
    assert (first.dense_size, again.dense_size) == (None, dense)
    assert PruningPlan.from_dict(again.to_dict()) == again
    prune(loaded, again)
    assert count_macs(loaded, images) == again.after["macs"]
    of_dense = PlanSummary.from_plan(again).of_dense
    assert of_dense == {key: again.after[key] / dense[key] for key in dense}
    assert of_dense["macs"] == pytest.approx(0.49, abs=0.02)


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "name", ["timm DeiT", slow("timm Swin"), slow("timm MobileViT"), "transformers ViT", slow("transformers Swin")]
)
def test_whole_heads_can_go_instead(name):
    family = FAST[name]
    images = torch.rand(2, 3, family[1], family[1], dtype=torch.float64)
    model = randomise(network(family))
    for seed in range(2):
        heads = {unit.name: unit.width for unit in pruning_units(model, images, heads=True) if unit.kind == "heads"}
        plan = check_against_masked(
            model, images, target=0.7, allocation="uniform", heads=True, seed=seed, max_ratio=0.6, min_channels=1
        )
        assert heads and any(len(plan.kept[unit]["heads"]) < width for unit, width in heads.items())
        assert PruningPlan.from_dict(plan.to_dict()) == plan


def same_weights():
    """The same ViT from timm and from transformers."""
    ours = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, embed_dim=48, num_heads=3, depth=2
    )
    values = VIT | {"intermediate_size": 192, "layer_norm_eps": 1e-6}
    theirs = transformers.AutoModelForImageClassification.from_config(
        hf("ViT", image_size=32, patch_size=8, **values)()
    )
    for parameter in ours.parameters():
        nn.init.normal_(parameter, 0.02, 0.2)
    tensors = ours.state_dict()
    renamed = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.{part}_proj")] = rows
        else:
            renamed[name] = tensor
    exchange = {
        "blocks.": "vit.layers.",
        "attn.proj": "attention.o_proj",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "head.": "classifier.",
    }
    for old, new in exchange.items():
        renamed = {name.replace(old, new): tensor for name, tensor in renamed.items()}
    renamed = {
        name.replace("norm.", "vit.layernorm.") if name.startswith("norm.") else name: t for name, t in renamed.items()
    }
    theirs.load_state_dict(renamed)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("allocation", ["mrs", "global"])
def test_the_same_weights_get_the_same_plan_in_timm_and_in_transformers(allocation):
    ours, theirs = same_weights()
    images, labels = torch.rand(4, 3, 32, 32), torch.randint(10, (4,))
    torch.testing.assert_close(ours(images), theirs(images).logits)
    options = {"batches": [(images, labels)], "attack": AttackConfig(eps=0.02, num_steps=2)}
    plans = [plan_pruning(model, images, allocation=allocation, **options) for model in (ours, theirs)]
    one, other = ([(unit.kind, unit.width, plan.kept[unit.name]) for unit in plan.units] for plan in plans)
    assert one == other
    assert list(plans[0].scores.values()) == pytest.approx(list(plans[1].scores.values()), rel=1e-3)
    if allocation == "mrs":
        assert plans[0].units[1].members == ("blocks.0.attn.qkv:q", "blocks.0.attn.qkv:k", "blocks.0.attn.qkv:v")
        parts = [plans[0].module_scores[member] for member in plans[0].units[1].members]
        assert plans[0].scores["blocks.0.attn"] == pytest.approx(sum(parts)) and min(parts) > 0
    for model, plan in zip((ours, theirs), plans, strict=True):
        prune(model, plan)
    torch.testing.assert_close(ours(images), theirs(images).logits)


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "transformers DeiT", "timm MobileViTV2"])
def test_every_layer_but_the_head_is_scored_as_a_member_of_its_unit(name):
    """Members are what sensitivities are measured of: queries, keys, values, projections, MLPs, convolutions."""
    model, images = randomise(network(FAST[name])).float(), torch.rand(2, 3, FAST[name][1], FAST[name][1])
    scores = module_robustness_sensitivity(
        model, [(images, torch.tensor([0, 1]))], AttackConfig(eps=0.01, num_steps=1), method="first_order"
    )
    members = [member for unit in pruning_units(model, images) for member in unit.members]
    assert len(set(members)) == len(members) and set(members) <= set(scores)
    layers = {member.partition(":")[0] for member in members}
    rest = [key for key in scores if key.partition(":")[0] not in layers]
    assert rest == [next(key for key in reversed(list(scores)) if ":" not in key)]  # the classifier
    assert all(scores[member] > 0 for member in members)


@pytest.mark.parametrize("name", ["timm ViT", slow("timm Swin"), slow("timm MobileViT")])
def test_fused_and_plain_attention_agree_after_pruning(name):
    model, images = network(FAST[name]).eval().double(), torch.rand(2, 3, FAST[name][1], FAST[name][1]).double()
    prune(model, plan_pruning(model, images, allocation="uniform", importance="random"))
    outputs = []
    for fused in (True, False):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        outputs.append(model(images))
        assert count_macs(model, images) == trace_units(model, images).size({})["macs"]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["transformers ViT", slow("transformers Swin")])
def test_attention_implementations_of_transformers_agree_after_pruning(name):
    model, images = network(FAST[name]).eval(), torch.rand(2, 3, FAST[name][1], FAST[name][1])
    prune(model, plan_pruning(model, images, allocation="uniform", importance="random"))
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        outputs.append(model(images).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_repair_refits_queries_at_the_scale_of_their_narrower_heads():
    """With nothing lost but channels of heads, the repaired network is the pruned one: there is nothing to refit."""
    model = network(FAST["timm ViT"]).eval()
    images, labels = torch.rand(16, 3, 32, 32), torch.randint(10, (16,))
    units = [unit.name for unit in pruning_units(model, images) if unit.kind == "channels"]
    for target, ignore, change in ((0.8, units, False), (0.5, ["blocks.0.mlp.fc1"], True)):
        pruned = copy.deepcopy(model)
        plan = plan_pruning(model, images, allocation="uniform", importance="random", target=target, ignore=ignore)
        before = prune(pruned, plan).blocks[1].attn.qkv.weight.detach().clone()
        report = repair(pruned, model, plan, [(images, labels)], None, damping=1e-4)
        after = pruned.blocks[1].attn.qkv.weight
        assert torch.equal(before, after) != change
        assert all(end <= start + 1e-9 for start, end in report.errors.values())
        if change:
            # Rows of the queries keep the size of the folded ones.
            rows = slice(0, len(after) // 3)
            ratio = (after[rows].norm() / before[rows].norm()).item()
            assert ratio == pytest.approx(
                (after[len(after) // 3 :].norm() / before[len(after) // 3 :].norm()).item(), rel=0.2
            )


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "hessian", "lamp", "fisher"])
@pytest.mark.parametrize("heads", [False, True])
def test_importances_know_attention(importance, heads):
    model = network(FAST["timm ViT"])
    with torch.no_grad():
        for block in model.blocks:
            rows = block.attn.qkv.weight.view(3, 3, 64, -1)
            rows[:, 1] *= 20.0
            rows[:2, :, 5] *= 50.0
            rows[2, :, 9] *= 50.0
            block.attn.proj.weight.view(-1, 3, 64)[:, 1] *= 20.0
    images, labels = torch.rand(4, 3, 32, 32), torch.randint(10, (4,))
    plan = plan_pruning(
        model,
        images,
        allocation="uniform",
        importance=importance,
        target=0.5,
        heads=heads,
        batches=[(images, labels)],
        attack=AttackConfig(eps=0.0),
    )
    kept = plan.kept["blocks.1.attn"]
    if heads:
        assert 1 in kept["heads"] and len(kept["heads"]) < 3
    elif importance in ("magnitude", "lamp"):
        assert all(5 in head for head in kept["qk"]) and all(9 in head for head in kept["v"])
        assert kept["qk"] != kept["v"]


@pytest.mark.parametrize(
    ("name", "size", "culprit"),
    [
        ("nest_tiny", 224, "timm.models.nest.Attention"),
        ("beit_base_patch16_224", 224, "timm.models.beit.Attention"),
        ("levit_128s", 224, "timm.models.levit.Attention"),
        ("swinv2_tiny_window8_256", 256, "timm.models.swin_transformer_v2.WindowAttention"),
        ("davit_tiny", 224, "timm.models.davit."),
        ("xcit_nano_12_p16_224", 224, "timm.models.cait.ClassAttn"),
        ("volo_d1_224", 224, "timm.models.volo."),
    ],
)
def test_namesakes_and_unknown_attention_are_refused_by_name(name, size, culprit):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    with pytest.raises(ValueError, match="refused rather than pruned wrongly") as error:
        known_layers(model)
    assert f"({culprit}" in str(error.value) and "register_attention" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, r"timm\.layers\.attention\.Attention\) has a parameter 'q_norm\.weight'"),
        ({"scale_attn_norm": True}, r"has a parameter 'norm\.weight'"),
    ],
)
def test_known_attention_with_more_inside_is_refused(options, message):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=1, **options)
    with pytest.raises(ValueError, match=message):
        pruning_units(model, torch.rand(1, 3, 32, 32))


def test_attention_with_another_softmax_scale_or_a_layer_inside_is_refused():
    model = network(FAST["timm ViT"])
    model.blocks[0].attn.scale = 0.5
    with pytest.raises(ValueError, match=r"has the softmax scale 0\.5, not head_dim \*\* -0\.5"):
        pruning_units(model, torch.rand(1, 3, 32, 32))
    model = network(FAST["timm ViT"])
    model.blocks[0].attn.q_norm = nn.Tanh()
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q_norm.*stands inside attention"):
        pruning_units(model, torch.rand(1, 3, 32, 32))


class CrossTalk(nn.Module):
    """A user's attention: other names, heads as a nested attribute, a bias for each head."""

    def __init__(self, width: int = 24, heads: int = 3):
        super().__init__()
        self.options = nn.Module()
        self.options.count = heads
        self.head_dim = width // heads
        self.ask, self.answer, self.say = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.mix = nn.Linear(width, width)
        self.loudness = nn.Parameter(torch.randn(heads))

    def forward(self, tokens):
        n, length, _ = tokens.shape
        q, k, v = (
            layer(tokens).view(n, length, self.options.count, self.head_dim).transpose(1, 2)
            for layer in (self.ask, self.answer, self.say)
        )
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5 + self.loudness.view(1, -1, 1, 1) * torch.eye(length).to(
            q
        )
        return self.mix((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Talkers(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, stride=4)
        self.talk = CrossTalk()
        self.norm = nn.LayerNorm(24)
        self.classes = nn.Linear(24, 5)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.classes(self.norm(tokens + self.talk(tokens)).mean(1))


def test_a_new_class_of_attention_is_taught_in_one_call(monkeypatch):
    monkeypatch.setattr("hf_mrpf.architectures.ATTENTIONS", dict(ATTENTIONS))
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"module 'talk' \(test_families\.CrossTalk\) multiplies matrices"):
        pruning_units(randomise(Talkers()), images)
    entry = {"q": "ask", "k": "answer", "v": "say", "out": "mix", "heads": "options.count"}
    register_attention(CrossTalk, **entry)
    with pytest.raises(ValueError, match=r"CrossTalk\) has a parameter 'loudness' that is not known"):
        pruning_units(randomise(Talkers()), images)
    monkeypatch.setattr("hf_mrpf.architectures.ATTENTIONS", dict(ATTENTIONS))
    register_attention(CrossTalk, **entry, per_head={"loudness": 0})
    for heads in (False, True):
        model = randomise(Talkers())
        plan = check_against_masked(
            model, images, target=0.5, allocation="uniform", heads=heads, min_channels=1, max_ratio=0.7
        )
        assert plan.units[1].members == ("talk.ask", "talk.answer", "talk.say")
        assert plan.units[1].kind == ("heads" if heads else "attention")
    for parameter, axis in (("loudness", 1), ("volume", 0), ("mix.bias", 0)):
        monkeypatch.setattr("hf_mrpf.architectures.ATTENTIONS", dict(ATTENTIONS))
        register_attention(CrossTalk, **entry, per_head={"loudness": 0, parameter: axis})
        with pytest.raises(ValueError, match=rf"has no parameter '{parameter}' with 3 entries along axis {axis}"):
            pruning_units(randomise(Talkers()), images)
    with pytest.raises(ValueError, match="CrossTalk is known already, with other settings"):
        register_attention(CrossTalk, **entry)
    with pytest.raises(ValueError, match="a class of modules is needed"):
        register_attention("CrossTalk", **entry)
    with pytest.raises(ValueError, match="three layers are needed, or one for all"):
        register_attention(Talkers, q="a", k="a", v="b", out="c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kept: [0, 1], "is attention and needs an object of 'heads', 'qk' and 'v'"),
        (lambda kept: kept | {"heads": [0, 0, 1]}, "needs a non-empty list of increasing integers"),
        (lambda kept: kept | {"heads": [0, 1]}, "needs one list of channels in 'qk' for each kept head"),
        (lambda kept: kept | {"qk": [[64], [0], [0]]}, "has channels 0 to 63 only"),
        (lambda kept: kept | {"v": [[0], [0], [0, 1]]}, "every head of unit .* needs the same number"),
        (lambda kept: kept | {"v": [[0.5], [0], [0]]}, "key 'kept' must be an object of lists of integers"),
        (lambda kept: kept | {"more": []}, "needs an object of 'heads', 'qk' and 'v'"),
    ],
)
def test_a_broken_plan_of_attention_is_refused(change, message):
    model, images = network(FAST["timm ViT"]), torch.rand(1, 3, 32, 32)
    values = plan_pruning(model, images, allocation="uniform").to_dict()
    values["kept"]["blocks.0.attn"] = change(values["kept"]["blocks.0.attn"])
    with pytest.raises(ValueError, match=message):
        PruningPlan.from_dict(values)


def test_a_plan_with_heads_that_the_model_has_not_is_refused():
    model, images = network(FAST["timm ViT"]), torch.rand(1, 3, 32, 32)
    values = plan_pruning(model, images, allocation="uniform").to_dict()
    values["kept"]["blocks.0.attn"]["heads"] = [0, 1, 3]
    with pytest.raises(ValueError, match=r"unit 'blocks\.0\.attn' has 3 heads of 64 channels"):
        prune(model, PruningPlan.from_dict(values))


@pytest.mark.parametrize("heads", [False, True])
def test_a_plan_that_cuts_heads_in_another_way_than_its_units_say_is_refused(heads):
    """Its ratios and sizes would be those of another network."""
    model, images = network(FAST["timm ViT"]), torch.rand(1, 3, 32, 32)
    values = plan_pruning(model, images, allocation="uniform", heads=heads).to_dict()
    kept = values["kept"]["blocks.0.attn"]
    if heads:
        kept["qk"] = kept["v"] = [list(range(10))] * len(kept["heads"])
    else:
        kept.update({part: kept[part][:2] for part in kept})
    with pytest.raises(ValueError, match=r"unit 'blocks\.0\.attn' has 3 heads of 64 channels"):
        prune(model, PruningPlan.from_dict(values))


def test_refresh_sets_sizes_of_attention_and_features():
    model, images = network(FAST["timm Swin"]).eval(), torch.rand(1, 3, 32, 32)
    prune(model, plan_pruning(model, images, allocation="uniform", target=0.4))
    merge, attention = model.layers[1].downsample, model.layers[1].blocks[0].attn
    assert (merge.dim, merge.out_dim) == (merge.reduction.in_features // 4, merge.reduction.out_features)
    assert attention.dim == attention.qkv.in_features
    assert attention.scale == (attention.proj.in_features / attention.num_heads) ** -0.5
    assert model.num_features == model.head.fc.in_features
    model.reset_classifier(3)
    assert model(images).shape == (1, 3)


# What a table of families says besides their names.
NOTES = {
    "ResNet": "`small_images`; VGG too",
    "ResNeXt": "whole groups, or channels inside every group",
    "RegNet": "whole groups, or channels inside every group; squeeze-and-excite",
    "MobileViT": "`small_images`",
    "MobileViTV2": "`small_images`; keys and values go together",
}


def supported_families():
    """The table of the README, from the networks that the tests above prune."""
    names = dict.fromkeys(["ResNet", *(name.partition(" ")[2] for name in FAST)])
    lines = ["| family | timm | transformers | attention | notes |", "| --- | --- | --- | --- | --- |"]
    for family in names:
        members = [FAST[name] for name in (f"timm {family}", f"transformers {family}") if name in FAST]
        images = torch.rand(1, 3, members[0][1], members[0][1])
        kinds = {unit.kind for unit in trace_units(network(members[0]), images, heads=True, check=False).units}
        attention = "channels of heads, or heads" if "heads" in kinds else "linear" if "attention" in kinds else ""
        timm_too = f"timm {family}" in FAST or family == "ResNet"
        here = ["yes" if there else "" for there in (timm_too, f"transformers {family}" in FAST)]
        lines.append(f"| {family} | {here[0]} | {here[1]} | {attention} | {NOTES.get(family, '')} |")
    return "\n".join(lines)


def test_the_readme_lists_the_families_that_are_tested():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert supported_families() in readme


def test_the_call_of_the_readme_teaches_a_class(monkeypatch):
    monkeypatch.setattr("hf_mrpf.architectures.ATTENTIONS", dict(ATTENTIONS))
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n([^`]*register_attention\([^`]*)```", readme)

    class MyAttention(nn.Module):
        pass

    exec(compile(block, "README.md", "exec"), {"MyAttention": MyAttention})
    assert architectures.ATTENTIONS[class_id(MyAttention())].q == "query"
