"""
Two processes compute what one does: each a share of the images, the same model on both after every stage.

On the CPU over gloo, and marked `nccl` on two GPUs over NCCL, where there are as many.
"""

import copy
import dataclasses
from itertools import chain

import numpy as np
import pytest
import torch
from accelerate import PartialState
from process_group import on_processes
from torch import nn
from transformers import TrainerCallback

import hf_mrpf.latency
from hf_mrpf import (
    AttackConfig,
    MRPFConfig,
    MRPFTrainer,
    PrunedForImageClassification,
    evaluate_robustness,
    load_image_data,
    module_robustness_sensitivity,
    plan_pruning,
    prune,
    repair,
)
from hf_mrpf.data import batches
from hf_mrpf.fingerprint import weights_sha256
from hf_mrpf.measured_allocation import MEASURED
from hf_mrpf.objectives import trades
from hf_mrpf.processes import Processes, check_same_model

NARROW = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 16), "stem_type": "deep", "stem_width": 4}
ATTACK = AttackConfig(eps=0.1, num_steps=2)
QUICK = {
    "eps": 0.1,
    "num_steps": 2,
    "eval_num_steps": 2,
    "calibration_sets": 2,
    "calibration_set_size": 21,
    "sensitivity_steps": 1,
    "recalibration_samples": 64,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=pytest.mark.nccl)])
def backend(request):
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip(f"NCCL needs a GPU for each of two processes, and there are {torch.cuda.device_count()}")
    return request.param


def here(item):
    """A copy of a model, or batches, on the device of this process."""
    device = PartialState().device
    if isinstance(item, nn.Module):
        return copy.deepcopy(item).to(device)
    return [(images.to(device), labels.to(device)) for images, labels in item]


def quick(**changes):
    return QUICK | {"use_cpu": PartialState().device.type == "cpu"} | changes


@pytest.fixture(scope="module")
def data():
    return load_image_data(max_train_samples=96, max_eval_samples=41)


@pytest.fixture(scope="module")
def net():
    """Trained a little, so that losses and gradients are no longer those of chance."""
    torch.manual_seed(1)
    model = PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, **NARROW
    )
    train = load_image_data(max_train_samples=96).train
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(10):
        for images, labels in batches(train, 32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images).logits, labels).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def sets(data):
    """Sets that two processes cannot halve, one of them too small for both to get an image."""
    images, labels = next(batches(data.train, 44))
    return [(images[:21], labels[:21]), (images[21:43], labels[21:43]), (images[43:], labels[43:])]


def measured(net, sets, distributed):
    """Everything that is computed on shares of calibration images."""
    net, sets = here(net), here(sets)
    example = torch.zeros(1, 3, 16, 16, device=PartialState().device)
    scores = {
        method: module_robustness_sensitivity(net, sets, ATTACK, method=method, distributed=distributed)
        for method in ("ascent", "first_order")
    }
    plans = {
        importance: plan_pruning(
            net, example, scores=scores["ascent"], importance=importance, batches=sets, attack=ATTACK,
            distributed=distributed,
        )
        for importance in ("taylor", "hessian", "fisher")
    }  # fmt: skip
    pruned = prune(copy.deepcopy(net), plans["taylor"])
    repaired = repair(pruned, net, plans["taylor"], sets, ATTACK, distributed=distributed)
    weights = {name: tensor.cpu() for name, tensor in pruned.state_dict().items()}
    return scores, {name: plan.kept for name, plan in plans.items()}, repaired.errors, weights


def test_sensitivity_importance_and_repair_on_shares_equal_those_of_one_process(net, sets, backend):
    ((scores, kept, errors, weights),) = on_processes(1, measured, net, sets, False, backend=backend)
    both = on_processes(2, measured, net, sets, True, backend=backend)
    for other_scores, other_kept, other_errors, other_weights in both:
        for method, values in scores.items():
            assert dict(other_scores[method]) == pytest.approx(dict(values), abs=1e-5)
            assert other_scores[method].settings["forwards"] == values.settings["forwards"]
        assert other_kept == kept
        assert {name: pair[1] for name, pair in other_errors.items()} == pytest.approx(
            {name: pair[1] for name, pair in errors.items()}, abs=1e-6
        )
        for name, tensor in weights.items():
            torch.testing.assert_close(other_weights[name], tensor, rtol=1e-3, atol=1e-4)
    assert dict(both[0][0]["ascent"]) == dict(both[1][0]["ascent"])
    assert all(torch.equal(tensor, both[1][3][name]) for name, tensor in both[0][3].items())
    assert max(scores["ascent"].values()) > 0.01  # something was measured


class Counting(nn.Module):
    """Counts the images that pass."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, images):
        self.seen += len(images)
        return self.net(images)


def evaluated(net, data, distributed, journal=None):
    counting = Counting(here(net))
    report = evaluate_robustness(
        counting,
        data,
        ("clean", "fgsm", "pgd20"),
        AttackConfig(eps=0.03),
        batch_size=8,
        distributed=distributed,
        journal=journal,
    )
    return report, counting.seen


def test_robust_evaluation_on_shares_gives_every_image_the_same_verdict_once(net, data, tmp_path, backend):
    journal = tmp_path / "verdicts.jsonl"
    ((whole, images),) = on_processes(1, evaluated, net, data.test, False, backend=backend)
    (first, seen), (second, seen_too) = on_processes(2, evaluated, net, data.test, True, journal, backend=backend)
    assert whole.num_samples == first.num_samples == len(data.test) == 41
    assert first.verdicts == second.verdicts == whole.verdicts
    assert first == dataclasses.replace(second, device=first.device)
    assert (first.images, first.intervals, first.zero_gradient_share) == (
        whole.images,
        whole.intervals,
        whole.zero_gradient_share,
    )
    assert 0 < first.attacks["pgd20"] < first.clean_accuracy
    # Each process looks at one image to know what can be folded, and at one whose answer is that of the journal.
    assert seen + seen_too == images + 3
    assert min(seen, seen_too) > images / 3
    # What two processes wrote down, one goes on from, once it knows the network by its answer to one image.
    ((again, forwards),) = on_processes(1, evaluated, net, data.test, False, journal, backend=backend)
    assert again == whole
    assert forwards == 1


def differing(net):
    """The check's message where rank 1 has one weight that differs in its last bit."""
    model, group = here(net), Processes.of(True)
    check_same_model(model, group, "at first")
    if group.rank == 1:
        weight = next(model.parameters())
        with torch.no_grad():
            weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], weight.new_tensor(9.0))
    with pytest.raises(ValueError) as error:
        check_same_model(model, group, "after training")
    return str(error.value)


def test_models_that_differ_between_processes_are_noticed_on_every_one(net, backend):
    messages = on_processes(2, differing, net, backend=backend)
    assert messages[0] == messages[1]
    assert messages[0].startswith("after training processes 1 hold other weights than process 0")
    with pytest.raises(ValueError, match="distributed=True needs a running process group"):
        Processes.of(True)


def failing(net, data):
    """What each process hears of where one fails: in a measured allocation, by the clock, and at the last image."""
    if Processes.of(True).is_main:
        MEASURED["broken"] = lambda *given: {}["nothing"]
        hf_mrpf.latency.latency_rounds = lambda *given, **keywords: {}["no clock"]
    else:
        MEASURED["broken"] = None
    model, group, said = here(net), Processes.of(True), []
    options = {"distributed": True, "batches": [data], "attack": ATTACK}
    for work in (
        lambda: plan_pruning(model, data[0], allocation="broken", **options),
        lambda: plan_pruning(model, data[0], allocation="uniform", target_metric="latency", distributed=True),
        lambda: evaluate_robustness(
            model, (data[0], data[1] + (torch.arange(len(data[1])) > 8) * 99), distributed=True
        ),
    ):
        try:
            work()
        except Exception as error:
            said.append(f"{type(error).__name__} {error}")
        group.gather(None)  # the others are still there
    return said


def test_what_fails_on_one_process_is_raised_on_all(net):
    data = torch.rand(10, 3, 16, 16), torch.arange(10)
    first, second = on_processes(2, failing, net, data, timeout=60)
    assert first[:2] == ["KeyError 'nothing'", "KeyError 'no clock'"]
    assert second[:2] == [
        f"RuntimeError process 0 failed with KeyError: {name}" for name in ("'nothing'", "'no clock'")
    ]
    assert first[2] == second[2] and first[2].startswith("ValueError The label of image 9 is 108")


def test_shares_cover_every_item_once():
    for count in range(8):
        for world in range(1, 5):
            parts = [list(range(count))[Processes(rank, world).share(count)] for rank in range(world)]
            assert list(chain(*parts)) == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


class Watch(TrainerCallback):
    """What each process sees: its random stream at every step, the weights after it, statistics when saving."""

    def __init__(self):
        self.streams, self.models, self.saved = [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.streams.append(torch.get_rng_state().sum().item())

    def on_step_end(self, args, state, control, **kwargs):
        self.models.append(weights_sha256(kwargs["model"]))

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(weights_sha256(kwargs["model"]))


def whole_story(folder, net, data):
    """Evaluation, pruning, training with saves, evaluation, by the trainer; what one process saw."""
    seen = {"wrapped": set(), "noise": [], "images": []}

    def watched(model, images, labels, attack, **kwargs):
        seen["wrapped"].add(type(model).__name__)
        output = trades(model, images, labels, attack, **kwargs)
        seen["images"] += images.flatten(1).double().sum(1).tolist()
        seen["noise"].append((output.adversarial_images - images).abs().sum().item())
        return output

    args = MRPFConfig(
        output_dir=str(folder),
        objective=watched,
        crop_padding=0,
        horizontal_flip=False,
        per_device_train_batch_size=8,
        max_steps=3,
        **quick(save_strategy="steps", save_steps=2),
    )
    watch = Watch()
    trainer = MRPFTrainer(copy.deepcopy(net), args, data.train, data.validation, callbacks=[watch])
    seen["metrics"] = trainer.evaluate()
    plan = trainer.prune()
    seen["plan"], seen["steps"] = plan.to_dict(), trainer.pruning_report
    seen["pruned"] = weights_sha256(trainer.model)
    trainer.evaluate()
    trainer.train()
    seen["trained"] = weights_sha256(trainer.model)
    first, seen["images"] = seen["images"], []
    trainer.train()  # once more with the same trainer, whose random streams have parted
    seen["images"] = [first, seen["images"]]
    return seen | {"streams": watch.streams, "models": watch.models, "saved": watch.saved}


def evaluated_and_pruned(folder, net, data):
    """Metrics and plan of one process."""
    trainer = MRPFTrainer(copy.deepcopy(net), MRPFConfig(str(folder), **quick()), data.train, data.validation)
    return trainer.evaluate(), trainer.prune()


def test_the_trainer_keeps_two_processes_at_one_model_through_every_stage(tmp_path, net, data, backend):
    first, second = on_processes(2, whole_story, tmp_path / "two", net, data, backend=backend)
    for key in ("plan", "steps", "pruned", "models", "trained", "saved"):
        assert first[key] == second[key], key
    assert len(set(first["models"])) == 6
    for mine, other in zip(first["images"], second["images"], strict=True):
        assert len(mine) == len(other) == 24
        assert len(set(mine) | set(other)) == 48  # no image twice
    # An evaluation came first, and the training still runs through DDP.
    assert first["wrapped"] == second["wrapped"] == {"DistributedDataParallel"}
    assert all(a != b for a, b in zip(first["streams"], second["streams"], strict=True))
    assert all(a != b for a, b in zip(first["noise"], second["noise"], strict=True))
    (saved,) = (tmp_path / "two").glob("checkpoint-2")
    loaded = PrunedForImageClassification.from_pretrained(saved)
    assert weights_sha256(loaded) == first["models"][4]
    assert first["models"][4] in first["saved"]
    # 41 validation images do not halve: padded ones are not counted.
    ((metrics, plan),) = on_processes(1, evaluated_and_pruned, tmp_path / "one", net, data, backend=backend)
    for name in ("eval_accuracy", "eval_robust_accuracy"):
        assert first["metrics"][name] == second["metrics"][name] == metrics[name]
    assert plan.kept == first["plan"]["kept"]
    assert plan.scores == pytest.approx(first["plan"]["scores"], abs=1e-5)


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))


def steps_of(folder, data, batch_size, switches):
    """Weights after two steps of PGD training without any randomness but the order of the data."""
    args = MRPFConfig(
        output_dir=str(folder),
        objective="pgd",
        random_start=False,
        crop_padding=0,
        horizontal_flip=False,
        max_steps=2,
        per_device_train_batch_size=batch_size,
        **quick(**switches),
    )
    trainer = MRPFTrainer(plain_net(), args, data.train)
    trainer.train()
    return torch.cat([parameter.detach().cpu().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("switches", [{}, {"awp_gamma": 0.05, "ema_decay": 0.6}], ids=["plain", "AWP and EMA"])
def test_two_processes_at_a_batch_take_the_steps_of_one_at_twice_the_batch(tmp_path, data, backend, switches):
    (alone,) = on_processes(1, steps_of, tmp_path, data, 16, switches, backend=backend)
    first, second = on_processes(2, steps_of, tmp_path, data, 8, switches, backend=backend)
    start = torch.cat([parameter.detach().flatten() for parameter in plain_net().parameters()])
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-6)
    assert (alone - start).abs().max() > 1e-3


def test_a_journal_goes_on_where_a_measurement_was_cut_short(net, sets, tmp_path, monkeypatch):
    whole = module_robustness_sensitivity(net, sets, ATTACK)
    counting = Counting(net)
    module_robustness_sensitivity(counting, sets, ATTACK, journal=tmp_path / "mrs.jsonl")
    everything, lines = counting.seen, (tmp_path / "mrs.jsonl").read_bytes().splitlines(keepends=True)
    cut = int(len(lines) * 0.6)
    strip = lambda scores: {name.removeprefix("net."): value for name, value in scores.items()}  # noqa: E731
    # Cut short within a line, at its very end, and with lines of something longer after it.
    for torn in (lines[cut][:7], lines[cut][:-1], lines[cut][:7] + b"\n" + b"".join(lines)):
        (tmp_path / "mrs.jsonl").write_bytes(b"".join(lines[:cut]) + torn)
        counting = Counting(net)
        again = module_robustness_sensitivity(counting, sets, ATTACK, journal=tmp_path / "mrs.jsonl")
        assert strip(again.scores) == dict(whole)
        assert again.settings["forwards"] == whole.settings["forwards"]
        assert again.settings["robust_losses"] == whole.settings["robust_losses"]
        assert counting.seen < 0.6 * everything
        assert (tmp_path / "mrs.jsonl").read_bytes() == b"".join(lines)
    # Other weights are another measurement.
    other = Counting(copy.deepcopy(net))
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    fresh = module_robustness_sensitivity(other, sets, ATTACK, journal=tmp_path / "mrs.jsonl")
    assert other.seen == everything
    assert not np.allclose(list(fresh.values()), list(whole.values()), atol=1e-7)
