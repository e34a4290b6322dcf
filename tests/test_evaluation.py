"""Verdicts equal what a linear model's geometry says; reports survive JSON; comparisons equal naive ones."""

import copy
import json
import math
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch import nn

from hf_mrpf import named_attacks
from hf_mrpf.apgd import apgd_attack
from hf_mrpf.attacks import AttackConfig, pgd_attack
from hf_mrpf.evaluation import (
    ATTACKS,
    NamedAttack,
    RobustnessReport,
    evaluate_robustness,
    paired_difference,
    wilson_interval,
)
from hf_mrpf.fab import fab_attack
from hf_mrpf.fingerprint import are_alike
from hf_mrpf.indexed_images import stratified_indices
from hf_mrpf.modes import in_own_dtype

ALL = ("clean", "fgsm", "pgd20", "cw")


class Linear(nn.Module):
    """Two classes by the sign of w . x + b, and a module that records the mode it runs in."""

    def __init__(self, weight, bias=0.0):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.tensor(bias))
        self.norm = nn.BatchNorm2d(3, affine=False)
        self.batches = []

    def forward(self, images):
        self.batches.append((self.training, len(images), images.dtype))
        score = (images.flatten(1) * self.weight.flatten()).sum(1) + self.bias
        return torch.stack([-score, score], 1)


def _linear_problem(count=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, 4, generator=generator)
    # Pixels well inside [0, 1], so that the box never limits a perturbation of up to 0.2.
    images = 0.3 + 0.4 * torch.rand(count, 3, 4, 4, generator=generator)
    scores = images.flatten(1) @ weight.flatten()
    middle = scores.sort().values[count // 2 - 1 : count // 2 + 1].mean()
    model = Linear(weight, -float(middle))
    margins = (scores + model.bias.detach()).abs()
    labels = (scores + model.bias.detach() > 0).long()
    labels[::7] = 1 - labels[::7]  # some that are misclassified as they are
    correct = torch.ones(count, dtype=torch.bool)
    correct[::7] = False
    return model, images, labels, margins, correct


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.01), ("l2", 0.05)])
@pytest.mark.parametrize("random_start", [True, False])
def test_linear_model_has_its_closed_form_robust_accuracy(norm, eps, random_start):
    model, images, labels, margins, correct = _linear_problem()
    dual = model.weight.detach().abs().sum() if norm == "linf" else model.weight.detach().norm()
    expected = correct & (margins > eps * dual)
    assert 0.2 < expected.float().mean() < 0.8 and (margins - eps * dual).abs().min() > 1e-4
    attack = AttackConfig(norm=norm, eps=eps, random_start=random_start)
    report = evaluate_robustness(model, (images, labels), ALL, attack)
    assert report.verdicts["clean"] == correct.tolist()
    for name in ("fgsm", "pgd20", "cw"):
        assert report.verdicts[name] == expected.tolist(), name
        assert report.attacks[name] == pytest.approx(expected.float().mean().item())
        assert report.intervals[name] == wilson_interval(int(expected.sum()), 64)
    assert report.clean_accuracy == pytest.approx(54 / 64)
    assert report.zero_gradient_share == 0.0
    assert (report.num_samples, report.norm, report.eps, report.seed) == (64, norm, eps, 0)


def test_settings_are_the_names_and_the_configs():
    model, images, labels, *_ = _linear_problem(8)
    attack = AttackConfig(eps=0.1, num_steps=3)
    settings = evaluate_robustness(model, (images, labels), ALL, attack).settings
    assert settings["fgsm"] == {
        "loss": "ce",
        "steps": 1,
        "step_size": 0.1,
        "restarts": 1,
        "random_start": False,
        "fooled_by": "any iterate",
    }
    assert settings["pgd20"] == {
        "loss": "ce",
        "steps": 20,
        "step_size": pytest.approx(2.5 * 0.1 / 20),
        "restarts": 1,
        "random_start": True,
        "fooled_by": "any iterate",
    }
    assert settings["cw"]["loss"] == "margin"
    given = evaluate_robustness(model, (images, labels), "pgd20", replace(attack, step_size=0.07)).settings
    assert given["pgd20"]["step_size"] == 0.07 and "fgsm" not in given
    still = evaluate_robustness(model, (images, labels), ALL, replace(attack, eps=0.0))
    assert set(still.attacks.values()) == {still.clean_accuracy}


def test_attacked_are_only_the_correct_ones_in_eval_mode():
    model, images, labels, _, correct = _linear_problem()
    model.train()
    model.norm.eval()
    evaluate_robustness(model, (images, labels), ("pgd20",), AttackConfig(eps=1e-6), batch_size=64)
    # One image shows what layouts the network takes, and which BatchNorm belongs to which convolution.
    assert model.batches[:2] == [(False, 1, torch.float32), (False, 64, torch.float32)]
    assert set(model.batches[2:]) == {(False, int(correct.sum()), torch.float32)}
    assert model.training and not model.norm.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_clean_alone_is_one_forward_without_gradient():
    model, images, labels, *_ = _linear_problem()
    report = evaluate_robustness(model, (images, labels), ("clean",), batch_size=64)
    assert (
        [count for _, count, _ in model.batches] == [1, 64]
        and report.attacks == {}
        and report.zero_gradient_share is None
    )
    assert list(report) == ["clean"]


def _small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 9, 5))


def _random_problem(count=60):
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, 3, 8, 8, generator=generator)
    model = _small_net()
    return model, images, model(images).argmax(1)


def test_batch_size_and_subset_change_no_verdict():
    model, images, labels = _random_problem()
    attack = AttackConfig(eps=0.02)
    whole = evaluate_robustness(model, (images, labels), ALL, attack, seed=3, batch_size=60)
    assert 0.1 < whole.attacks["pgd20"] < 0.9
    torch.manual_seed(99)  # the global random state is not read either
    pieces = evaluate_robustness(model, (images, labels), ALL, attack, seed=3, batch_size=7)
    assert pieces.verdicts == whole.verdicts and pieces.images == whole.images
    chunks = [(images[:13], labels[:13]), {"pixel_values": images[13:], "labels": labels[13:]}]
    streamed = evaluate_robustness(model, iter(chunks), ALL, attack, seed=3)
    assert streamed.verdicts == whole.verdicts and streamed.images == whole.images

    first = evaluate_robustness(model, iter(chunks), ALL, attack, num_samples=20, seed=3)
    assert first.verdicts["cw"] == whole.verdicts["cw"][:20] and first.num_samples == 20


def test_random_start_is_keyed_by_seed_and_index(monkeypatch):
    model, images, labels = _random_problem(12)
    starts = {}

    def record(images, indices, attack, seed, restart):
        starts.update({(seed, index): image for index, image in zip(indices, images, strict=True)})
        return images

    monkeypatch.setattr(named_attacks, "keyed_start", record)
    evaluate_robustness(model, (images, labels), ("pgd20",), AttackConfig(eps=0.01), num_samples=5, seed=4)
    assert len(starts) == 5
    assert all(seed == 4 and torch.equal(image, images[index]) for (seed, index), image in starts.items())


def test_subset_is_stratified_and_seeded():
    model = _small_net()
    images, labels = torch.rand(60, 3, 8, 8), torch.arange(60) % 3
    seen = {}
    for seed in (0, 0, 1):
        report = evaluate_robustness(model, (images, labels), ("clean",), num_samples=12, seed=seed)
        assert report.num_samples == 12
        seen.setdefault(seed, []).append(report.images)
    assert seen[0][0] == seen[0][1] != seen[1][0]
    counted = []
    order = stratified_indices(labels.tolist(), 12, 0)
    counted = torch.bincount(labels[order]).tolist()
    assert counted == [4, 4, 4]
    assert evaluate_robustness(model, (images, labels), ("clean",), num_samples=1000).num_samples == 60


def test_restarts_must_all_be_withstood(monkeypatch):
    model, images, labels = _random_problem(50)
    starts = []

    def start_at_noise(images, indices, attack, seed, restart):
        starts.append((restart, list(indices)))
        noise = torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(seed + restart))[list(indices)].sign()
        return (images + attack.eps * noise).clamp(0, 1)

    monkeypatch.setattr(named_attacks, "keyed_start", start_at_noise)
    attack = AttackConfig(eps=0.3, step_size=1e-6)  # the start decides
    single = {}
    for seed in (0, 1, 2):
        single[seed] = evaluate_robustness(model, (images, labels), ("pgd20",), attack, seed=seed).verdicts["pgd20"]
    together = [all(bits) for bits in zip(*single.values(), strict=True)]
    assert sum(together) < min(map(sum, single.values()))
    monkeypatch.setitem(ATTACKS, "pgd20x3", (NamedAttack("ce", 20, restarts=3),))
    starts.clear()
    report = evaluate_robustness(model, (images, labels), ("pgd20x3",), attack)
    assert report.verdicts["pgd20x3"] == together
    assert [restart for restart, _ in starts] == [0, 1, 2]
    assert len(starts[0][1]) > len(starts[1][1]) > len(starts[2][1])  # survivors alone go on
    assert report.settings["pgd20x3"]["restarts"] == 3


def test_dataset_of_images_equals_its_tensors():
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8, generator=generator)
    labels = [index % 2 for index in range(20)]
    pictures = [PILImage.fromarray(image.numpy()) for image in pixels]
    features = Features({"img": Image(), "label": ClassLabel(names=["a", "b"])})
    dataset = Dataset.from_dict({"img": pictures, "label": labels}, features=features)
    tensors = (pixels.permute(0, 3, 1, 2).float() / 255, torch.tensor(labels))
    model = _small_net()
    arguments = {"attacks": ALL, "attack": AttackConfig(eps=0.02), "num_samples": 11, "batch_size": 4}
    from_dataset = evaluate_robustness(model, dataset, **arguments)
    from_tensors = evaluate_robustness(model, tensors, **arguments)
    assert from_dataset.verdicts == from_tensors.verdicts and from_dataset.images == from_tensors.images


def _named(names, labels=(0, 1)):
    pixels = [PILImage.new("RGB", (8, 8)) for _ in labels]
    features = Features({"img": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"img": pixels, "label": list(labels)}, features=features)


def test_classes_of_a_data_set_must_be_those_of_the_model():
    model = _small_net()
    model.config = SimpleNamespace(id2label={4: "e", 0: "a", 1: "b", 2: "c", 3: "d"})
    for names, message in (
        (["b", "a", "c", "d", "e"], "class 0 is 'a' for the model and 'b' in the data set"),
        (["a", "b", "x"], "class 2 is 'c' for the model and 'x' in the data set"),
        (["a", "b", "c", "d", "e", "f"], "the data set has 6 classes, and the model the first 5"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_robustness(model, _named(names), "clean")
    for names in (["a", "b"], ["A", " b"], ["0", "1"]):
        assert evaluate_robustness(model, _named(names), "clean").num_samples == 2
    twelve = [f"c{index}" for index in range(12)]
    model.config.id2label = {str(index): name for index, name in enumerate(twelve)}  # as JSON has them
    assert evaluate_robustness(model, _named(twelve), "clean").num_samples == 2
    # Names that were made up tell nothing.
    numbered = _named(["b", "a"]).cast_column("label", Value("int64"))
    assert evaluate_robustness(model, numbered, "clean").num_samples == 2
    model.config.id2label = {index: f"LABEL_{index}" for index in range(5)}
    assert evaluate_robustness(model, _named(["b", "a"]), "clean").num_samples == 2


def test_a_mapping_of_tensors_is_one_batch():
    model, images, labels = _random_problem(8)
    batch = {"pixel_values": images, "labels": labels}
    assert evaluate_robustness(model, batch, "clean") == evaluate_robustness(model, (images, labels), "clean")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(torch.rand(3, 8, 8), 3)] * 3, r"single images \[3, 8, 8\], each with its label; batches of them are needed"),
        ([{"pixel_values": torch.rand(3, 8, 8), "labels": 1}] * 3, r"single images \[3, 8, 8\]"),
        ([{"image": 1, "label": 2}], "data yields mappings of image, label; pixel_values and labels are needed"),
        ([(torch.rand(2, 3, 8, 8), [0, 1])], "images that are a Tensor with labels that are a list; give"),
        (_named(["a", "b"]).to_iterable_dataset(), "data is an IterableDataset, .* without streaming"),
    ],
)
def test_data_of_other_kinds_are_refused_with_what_to_give(data, message):
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(_small_net(), data)


def test_other_dtypes_are_evaluated_in_float32():
    model, images, labels, *_ = _linear_problem()
    single = evaluate_robustness(model, (images, labels), ALL, AttackConfig(eps=0.03))
    half = copy.deepcopy(model).bfloat16()
    half.batches.clear()
    report = evaluate_robustness(half, (images, labels), ALL, AttackConfig(eps=0.03))
    twin = evaluate_robustness(copy.deepcopy(half).float(), (images, labels), ALL, AttackConfig(eps=0.03))
    assert report.verdicts == twin.verdicts and (report.dtype, twin.dtype) == ("bfloat16", "float32")
    assert half.weight.dtype == torch.bfloat16 and not half.batches, "a copy runs, not the model itself"
    double = evaluate_robustness(copy.deepcopy(model).double(), (images.double(), labels), ALL, AttackConfig(eps=0.03))
    assert double.verdicts == single.verdicts and double.dtype == "float64"


def test_share_of_zero_gradients():
    class Masked(nn.Module):
        def forward(self, images):
            bright = images[:, 0, 0, 0] > 0.5
            squares = images.square().sum((1, 2, 3))
            score = torch.where(bright, squares, squares.detach())
            return torch.stack([score, 0.9 * score], 1)

    images = torch.rand(10, 3, 4, 4)
    images[:, 0, 0, 0] = torch.tensor([0.9] * 6 + [0.1] * 4)
    report = evaluate_robustness(Masked(), (images, torch.zeros(10, dtype=torch.int64)), ("fgsm",), batch_size=3)
    assert report.zero_gradient_share == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "uint8"),
        (torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), r"\[0, 1\]"),
        (torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), r"shape \[4, 1, 8, 8\]"),
        (torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 5, 7]), "label of image 2 is 5, but the model has 5 classes"),
        (torch.rand(4, 3, 8, 8), torch.tensor([0, -1, 1, 1]), "label of image 1 is -1"),
        (torch.rand(4, 3, 8, 8), torch.zeros(4), r"labels are torch.float32 of shape \[4\]; int64 class indices \[4\]"),
        (torch.rand(4, 3, 8, 8), torch.zeros(3, dtype=torch.int64), "There are 4 images and 3 labels"),
        (torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64), "no images to evaluate"),
    ],
)
def test_bad_images_and_labels_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(_small_net(), (images, labels))


def test_other_bad_input_is_refused():
    model, images, labels = _random_problem(8)
    with pytest.raises(ValueError, match=r"Unknown attacks 'pgd7', 'x'; known: clean, fgsm, .*, autoattack"):
        evaluate_robustness(model, (images, labels), ("clean", "pgd7", "x"))
    with pytest.raises(ValueError, match="several splits \\(train, test\\)"):
        evaluate_robustness(model, {"train": 1, "test": 2})
    with pytest.raises(ValueError, match="no images"):
        evaluate_robustness(model, iter(()))
    for wrong in (0, True, 2.5):
        with pytest.raises(ValueError, match=f"num_samples is {wrong}"):
            evaluate_robustness(model, (images, labels), num_samples=wrong)
        with pytest.raises(ValueError, match=f"batch_size is {wrong}.*at least 1\\."):
            evaluate_robustness(model, (images, labels), batch_size=wrong)
    for wrong in (-1, True, 2.5):
        with pytest.raises(ValueError, match=f"seed is {wrong}; it must be an integer of at least 0"):
            evaluate_robustness(model, (images, labels), seed=wrong)


def test_logits_that_are_not_finite_name_the_image():
    class Broken(nn.Module):
        def forward(self, images):
            logits = images.mean((2, 3))
            return torch.where(images[:, :1, 0, 0] == 0.25, math.nan, logits)

    images = torch.rand(9, 3, 4, 4)
    images[6, 0, 0, 0] = 0.25
    with pytest.raises(ValueError, match="logits of image 6 are not finite"):
        evaluate_robustness(Broken(), (images, torch.zeros(9, dtype=torch.int64)), batch_size=4)


@pytest.fixture(scope="module")
def report():
    model, images, labels = _random_problem()
    return evaluate_robustness(model, (images, labels), ALL, AttackConfig(eps=0.02), data_name="noise", seed=2)


def test_report_survives_json(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert RobustnessReport.load(tmp_path / "report.json") == report
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["attacks"] == report.attacks and content["clean_accuracy"] == report.clean_accuracy == 1.0
    assert (content["num_samples"], content["seed"], content["norm"], content["eps"]) == (60, 2, "linf", 0.02)
    assert content["data_name"] == "noise" and content["versions"]["torch"] == metadata.version("torch")
    assert content["device"] == "cpu" and content["dtype"] == "float32"
    assert content["verdicts"]["pgd20"].count("1") / 60 == report.attacks["pgd20"]


def test_report_in_one_line(report):
    line = str(report)
    assert line.startswith("clean 100.0 % [94.0, 100.0], fgsm ")
    assert line.endswith("(n=60, linf eps=0.02, seed 2)") and "\n" not in line
    assert "verdicts" not in repr(report)


def test_broken_reports_are_refused(report, tmp_path):
    content = report.to_dict()
    assert RobustnessReport.from_dict(content | {"table": [1]}) == report
    with pytest.raises(ValueError, match=r"missing keys eps, seed\."):
        RobustnessReport.from_dict({key: value for key, value in content.items() if key not in ("eps", "seed")})
    with pytest.raises(ValueError, match=r"Robust accuracy 0\.9 under pgd20 and clean accuracy 0\.8 contradict"):
        RobustnessReport.from_dict(content | {"clean_accuracy": 0.8, "attacks": {"pgd20": 0.9}})
    for text in ("{", "[]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json"):
            RobustnessReport.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(successes, total, low, high):
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(total - successes, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_refuses_what_is_no_proportion():
    for successes, total in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no proportion"):
            wilson_interval(successes, total)


def _with_verdicts(report, bits):
    return replace(
        report,
        clean_accuracy=1.0,
        num_samples=len(bits),
        attacks={"pgd20": sum(bits) / len(bits)},
        verdicts={"clean": [True] * len(bits), "pgd20": bits},
    )


def test_paired_difference_equals_a_naive_one(report):
    generator = torch.Generator().manual_seed(0)
    a, b = ((torch.rand(500, generator=generator) < share).tolist() for share in (0.6, 0.5))
    found = paired_difference(_with_verdicts(report, a), _with_verdicts(report, b), "pgd20")
    differences = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    assert found.difference == pytest.approx(differences.mean().item())
    assert found.standard_error == pytest.approx(differences.std(unbiased=True).item() / math.sqrt(500))
    # At this size the interval of Bonett and Price is the naive one to a fraction of a point.
    naive = [found.difference - 1.96 * found.standard_error, found.difference + 1.96 * found.standard_error]
    assert found.interval == pytest.approx(naive, abs=2e-3)


def test_equal_verdicts_still_leave_an_interval(report):
    bits = [True, False] * 50
    found = paired_difference(_with_verdicts(report, bits), _with_verdicts(report, bits), "pgd20")
    assert (found.difference, found.standard_error) == (0.0, 0.0)
    expected = 1.959964 * math.sqrt(2 / 102 / 102)
    assert found.interval == pytest.approx((-expected, expected))


def test_paired_difference_refuses_different_images_and_attacks(report):
    model, images, labels = _random_problem()
    attack = AttackConfig(eps=0.02)
    other = evaluate_robustness(model, (images.flip(0), labels.flip(0)), ALL, attack, seed=2)
    with pytest.raises(ValueError, match="different images"):
        paired_difference(report, other)
    stronger = evaluate_robustness(model, (images, labels), ALL, AttackConfig(eps=0.05), seed=2)
    assert paired_difference(report, stronger).difference == 0
    with pytest.raises(ValueError, match=r"pgd20 differs: .*0.02.* in the first report, .*0.05"):
        paired_difference(report, stronger, "pgd20")
    with pytest.raises(ValueError, match=r"no verdicts under 'pgd7'; it has clean, fgsm, pgd20, cw"):
        paired_difference(report, report, "pgd7")


def test_evaluation_is_in_float32_wherever_accelerate_has_put_its_autocast():
    seen = set()

    class Watched(nn.Conv2d):
        def forward(self, images):
            output = super().forward(images)
            seen.add(output.dtype)
            return output

    network = nn.Sequential(Watched(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    network(images)
    AcceleratorState._reset_state(True)  # another test of this process may have left one
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(network)
    AcceleratorState._reset_state(True)
    for model in (prepared, nn.Sequential(prepared)):
        seen.clear()
        report = evaluate_robustness(model, (images, labels), ["pgd20"])
        assert (seen, report.dtype) == ({torch.float32}, "float32")
        seen.clear()
        model(images)
        assert seen == {torch.bfloat16}, "afterwards it is as it was"


def test_on_a_gpu_products_are_of_float32_and_not_of_tf32():
    class OnGpu(nn.Linear):
        """Its weights say that they are on a GPU."""

        def parameters(self, recurse=True):
            return iter([SimpleNamespace(device=torch.device("cuda"))])

    def precisions():
        return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision

    before = precisions()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(KeyError), in_own_dtype(OnGpu(2, 2)):
            assert precisions() == ("ieee", "ieee")
            raise KeyError
        assert precisions() == (before[0], "tf32")
        with in_own_dtype(nn.Linear(2, 2)):
            assert precisions() == (before[0], "tf32"), "a network on the CPU leaves the GPU's switches alone"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before[1]


class Shifted(nn.Module):
    """Normalises by plain attributes, which are in no state dict."""

    def __init__(self, net, mean, scale):
        super().__init__()
        self.net, self.mean, self.scale = net, mean, scale

    def forward(self, pixels):
        return self.net((pixels - self.mean) * self.scale)


@pytest.mark.parametrize(
    "others",
    [
        [(0.5, 1.0), (0.5, -1.0)],
        [(torch.full((3, 1, 1), mean), 1.0) for mean in (0.5, 0.9)],
        [(0.5, torch.as_tensor(scale, dtype=torch.float32)) for scale in (1, -1)],
    ],
)
def test_a_journal_of_one_network_is_not_taken_for_another_with_the_same_weights(tmp_path, others):
    net, images, labels = _random_problem(40)
    found, alone = [], []
    for mean, scale in [*others, others[0]]:
        model = Shifted(net, mean, scale)
        found.append(evaluate_robustness(model, (images, labels), ["clean"], journal=tmp_path / "verdicts.jsonl"))
        alone.append(evaluate_robustness(model, (images, labels), ["clean"]))
    assert [report.verdicts for report in found] == [report.verdicts for report in alone]
    assert found[0].verdicts == found[2].verdicts != found[1].verdicts


def test_an_evaluation_goes_on_where_a_network_counts_its_calls_or_square_is_asked_for_alone(tmp_path, monkeypatch):
    net, images, labels = _random_problem(20)
    monkeypatch.setitem(ATTACKS, "square", (NamedAttack("margin", 20, method="square"),))
    passed = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = net, 0

        def forward(self, pixels):
            self.calls += 1
            passed.append(len(pixels))
            return self.net(pixels)

    counted, counts = Counted(), []
    for attacks in (["pgd20", "square"], ["square"], ["pgd20"]):
        passed.clear()
        data = images, labels
        evaluate_robustness(counted, data, attacks, AttackConfig(eps=0.02), journal=tmp_path / "verdicts.jsonl")
        counts.append(sum(passed))
    # The image whose answer is looked at; and of Square alone the clean answers, once more without their gradients.
    assert counts[0] > 100 and counts[1:] == [21, 1]
    passed.clear()
    evaluate_robustness(counted, data, ["clean"], AttackConfig(eps=0.02), journal=tmp_path / "verdicts.jsonl")
    assert sum(passed) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["verdicts.jsonl"]


def test_a_model_without_gradients_is_attacked_by_square_alone(monkeypatch):
    net, images, labels = _random_problem(20)
    monkeypatch.setitem(ATTACKS, "square", (NamedAttack("margin", 20, method="square"),))

    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        @torch.no_grad()
        def forward(self, pixels):
            return self.net(pixels)

    attack = AttackConfig(eps=0.1)
    closed = evaluate_robustness(Closed(), (images, labels), ["square"], attack)
    assert closed.verdicts == evaluate_robustness(net, (images, labels), ["square"], attack).verdicts
    assert closed.zero_gradient_share is None
    with pytest.raises(ValueError, match="lets no gradient through to its images.*square"):
        evaluate_robustness(Closed(), (images, labels), ["square", "pgd20"], attack)
    for run in (pgd_attack, apgd_attack):
        with pytest.raises(ValueError, match="lets no gradient through to its images.*square"):
            run(Closed(), images, labels, attack)
    with pytest.raises(ValueError, match="lets no gradient through to its images.*square"):
        fab_attack(Closed(), images, labels, attack, targets=(labels + 1) % 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.rand(2, 3, 8, 8), [0, 1]), r"data is a tensor and a list; give labels as torch.as_tensor\(labels\)"),
        ({"pixel_values": torch.rand(2, 3, 8, 8), "label": torch.arange(2)}, "pixel_values and labels are needed"),
    ],
)
def test_data_of_another_form_is_told_of(data, message):
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(_small_net(), data, ["clean"])


def test_a_journal_tells_networks_apart_that_differ_in_their_gradients_alone(tmp_path):
    class Quantised(nn.Module):
        def __init__(self, straight_through):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.straight_through = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), straight_through

        def forward(self, pixels):
            coarse = (pixels * 15).round() / 15
            return self.net(pixels + (coarse - pixels).detach() if self.straight_through else coarse)

    images = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    data = images, Quantised(False)(images).argmax(1)
    options = {"attacks": ["pgd20"], "attack": AttackConfig(eps=16 / 255), "journal": tmp_path / "verdicts.jsonl"}
    masked, open_ = (evaluate_robustness(Quantised(through), data, **options) for through in (False, True))
    assert masked.zero_gradient_share == 1 and open_.zero_gradient_share == 0
    assert open_.attacks["pgd20"] < 0.1 < masked.attacks["pgd20"]


def test_rounding_makes_no_other_network():
    torch.manual_seed(0)
    answers = {"logits": torch.randn(1000).tolist(), "gradient": torch.randn(16).tolist()}
    rounded = {name: [value * (1 + 1e-5) for value in values] for name, values in answers.items()}
    assert are_alike(answers, rounded) and are_alike({}, {})
    assert not are_alike(answers, answers | {"logits": [-value for value in answers["logits"]]})
    assert not are_alike(answers, answers | {"gradient": []})
