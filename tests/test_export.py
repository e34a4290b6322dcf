"""Exported files compute what the model computes, for any batch, or there is no file."""

import copy
import json
import runpy
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import NamedTuple

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import MobileViTConfig, ResNetConfig, ViTConfig

from hf_mrpf import PrunedForImageClassification, export_model, plan_pruning, prune
from hf_mrpf.efficiency import measure_latency
from hf_mrpf.export import FORMATS, Format, load_exported

REPOSITORY = Path(__file__).resolve().parent.parent
CLASSES = ["zero", "one", "zwölf"]
NARROW = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 16)}
VIT = {"image_size": 32, "patch_size": 8, "depth": 2, "drop_rate": 0.5}
MOBILEVIT = {
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
    "num_attention_heads": 2,
    "expand_ratio": 2.0,
}
SMALL_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 8,
}


def make(backbone, **options):
    torch.manual_seed(0)
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    return PrunedForImageClassification.from_backbone(
        backbone, id2label=dict(enumerate(CLASSES)), **statistics, **options
    )


def tiny(size=16):
    """One residual block, for what does not depend on the network."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    return make(config, image_size=size, small_images=True)


FAMILIES = {
    "tiny": tiny,
    "resnet": lambda: make("timm/resnet18", image_size=16, small_images=True, **NARROW),
    "mobilevit": lambda: make("timm/mobilevit_xxs", image_size=32, small_images=True),
    "vit": lambda: make("timm/vit_tiny_patch16_224", **VIT),
    "transformers-vit": lambda: make(ViTConfig(**SMALL_VIT), image_size=32),
    "transformers-mobilevit": lambda: make(MobileViTConfig(**MOBILEVIT), image_size=32, small_images=True),
}


def pruned(family):
    """A pruned model of which no tensor has the value it was born with: zeros and ones would hide a mistake."""
    model = FAMILIES[family]()
    size = model.config.image_size
    prune(model, plan_pruning(model, torch.rand(1, 3, size, size), target=0.5, allocation="uniform"))
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim > 1:
            parameter.data = noise / (parameter.numel() / len(parameter)) ** 0.5
        else:
            parameter.data += 0.1 * noise
    # Statistics of real activations: with made-up ones the images' differences die out in a deep network.
    normalisations = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in normalisations:
        module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(16, 3, size, size))
    for module in normalisations:
        module.momentum = 0.1
    return model


def logits(model, images):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(images).logits


def images_for(model, batch):
    return torch.rand(batch, 3, model.config.image_size, model.config.image_size)


class Exported(NamedTuple):
    """A model, what export_model made of it, and the files as anybody would load them."""

    model: PrunedForImageClassification
    folder: Path
    files: list
    program: torch.export.ExportedProgram
    extra: dict
    session: onnxruntime.InferenceSession


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Makes, once a family, the model and the folder that it was exported to while it was in train mode."""
    made = {}

    def get(family):
        if family not in made:
            model = pruned(family).train()
            next(module for module in model.modules() if isinstance(module, nn.Conv2d)).eval()  # frozen on purpose
            before = {name: module.training for name, module in model.named_modules()}
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            folder = tmp_path_factory.mktemp(family)
            files = export_model(model, folder)
            assert {name: module.training for name, module in model.named_modules()} == before
            assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
            assert all(parameter.requires_grad for parameter in model.parameters())
            extra = {"id2label": "", "image_size": ""}
            program = torch.export.load(folder / "model.pt2", extra_files=extra)
            session = onnxruntime.InferenceSession(folder / "model.onnx")
            made[family] = Exported(model, folder, files, program, extra, session)
        return made[family]

    return get


SLOW = ("mobilevit",)  # the conversion to ONNX takes half a minute
families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.slow) if family in SLOW or family.startswith("transformers") else family
        for family in FAMILIES
    ],
)


@families
def test_files_give_the_logits_of_the_model_at_any_batch(exported, family):
    model, folder, files, program, _, session = exported(family)
    assert [(file.format, file.path) for file in files] == [
        ("pt2", folder / "model.pt2"),
        ("onnx", folder / "model.onnx"),
    ]
    found = {
        "pt2": program.module(),
        "onnx": lambda x: torch.from_numpy(session.run(None, {"pixel_values": x.numpy()})[0]),
    }
    for batch in (1, 8, 5, 33):
        images = images_for(model, batch)
        expected = logits(model, images)
        if batch > 1:  # else a file that ignores its images would pass
            assert expected.std(0).max() > 1e-3
        for run in found.values():
            assert run(images).shape == (batch, 3)
            torch.testing.assert_close(run(images), expected, rtol=0, atol=1e-4)
    for file in files:
        assert file.size == file.path.stat().st_size
        generator = torch.Generator().manual_seed(0)
        size = model.config.image_size
        images = torch.rand(8, 3, size, size, generator=generator)
        worst = max((found[file.format](x) - logits(model, x)).abs().max().item() for x in (images[:1], images))
        assert file.difference == pytest.approx(worst, abs=1e-5) and file.difference <= 1e-4


@families
def test_files_say_what_they_take_and_give_and_nothing_of_this_machine(exported, family):
    model, folder, _, _, extra, session = exported(family)
    size, names = model.config.image_size, {str(index): name for index, name in enumerate(CLASSES)}
    assert {path.name for path in folder.iterdir()} == {"model.pt2", "model.onnx"}
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape, taken.type) == ("pixel_values", ["batch", 3, size, size], "tensor(float)")
    assert (given.name, given.shape) == ("logits", ["batch", 3])
    metadata = session.get_modelmeta().custom_metadata_map
    assert (json.loads(metadata["id2label"]), metadata["image_size"]) == (names, str(size))
    onnx.checker.check_model(onnx.load(folder / "model.onnx"), full_check=True)
    assert (json.loads(extra["id2label"]), extra["image_size"]) == (names, str(size))
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        contents = b"".join(archive.read(name) for name in archive.namelist())
    for place in (REPOSITORY, folder, sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"]):
        assert str(place).encode() not in contents + (folder / "model.onnx").read_bytes()


def test_the_files_are_of_the_pruned_network(exported):
    model, folder, _, program, _, _ = exported("resnet")
    head = [len(CLASSES), model.backbone.fc.in_features]
    assert head[1] < NARROW["channels"][-1]
    assert head in [list(weight.dims) for weight in onnx.load(folder / "model.onnx").graph.initializer]
    assert head in [list(weight.shape) for weight in program.state_dict.values()]


def test_the_fused_attention_kernel_is_exported(exported):
    vit = exported("vit")
    assert all(block.attn.fused_attn for block in vit.model.backbone.blocks)
    targets = {str(node.target) for node in vit.program.graph.nodes}
    assert "aten.scaled_dot_product_attention.default" in targets


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "transformers-vit"])
def test_plain_attention_is_exported_too(family, tmp_path):
    model = pruned(family)
    for block in getattr(model.backbone, "blocks", ()):
        block.attn.fused_attn = False
    if family == "transformers-vit":
        model.save_pretrained(tmp_path)
        model = PrunedForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    images = images_for(model, 5)
    for file in export_model(model, tmp_path / "export"):
        torch.testing.assert_close(load_exported(file.path)(images), logits(model, images), rtol=0, atol=1e-4)
    targets = {str(node.target) for node in torch.export.load(tmp_path / "export/model.pt2").graph.nodes}
    assert "aten.scaled_dot_product_attention.default" not in targets


@pytest.fixture(scope="module")
def small(exported):
    return exported("tiny")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_files_take_single_precision_whatever_dtype_is_the_default(small, tmp_path, set_default_dtype, dtype):
    model, images = copy.deepcopy(small.model), images_for(small.model, 2)
    model.config.return_dict = False
    expected = logits(small.model, images)
    set_default_dtype(dtype)
    seen = []
    for file in export_model(model, tmp_path):
        torch.testing.assert_close(load_exported(file.path)(images), expected, rtol=0, atol=1e-4)
    measure_latency({"any": lambda images: seen.append(images.dtype)}, 8, rounds=1)
    assert set(seen) == {torch.float32}


def shifted(model, folder, amount):
    """File of the same network whose first logit is `amount` too high."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.backbone.classifier[1].bias[0] += amount
    (file,) = export_model(other, folder, "pt2")
    return file.path


def test_a_file_of_other_logits_is_refused_and_the_old_files_stay(small, tmp_path, monkeypatch):
    model = small.model
    close, wrong = shifted(model, tmp_path / "close", 5e-5), shifted(model, tmp_path / "wrong", 2e-4)
    folder = tmp_path / "export"
    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, "pt2", Format(lambda program, path, _: shutil.copy(close, path), FORMATS["pt2"].load))
        (file,) = export_model(model, folder, ["pt2"])
    assert file.difference == pytest.approx(5e-5, rel=0.05)
    before = file.path.read_bytes()
    monkeypatch.setitem(FORMATS, "pt2", Format(lambda program, path, _: shutil.copy(wrong, path), FORMATS["pt2"].load))
    with pytest.raises(ValueError, match=r"model\.pt2 differs from the model by 0\.0002 in a logit at batch 1, more"):
        export_model(model, folder, ["pt2"])
    assert [path.name for path in folder.iterdir()] == ["model.pt2"] and file.path.read_bytes() == before


def test_the_difference_is_the_largest_of_both_batches(small, tmp_path, monkeypatch):
    write, load = FORMATS["pt2"]

    def slightly_wrong(path):
        run = load(path)
        return lambda images: run(images) + 5e-5 * (len(images) == 8)

    monkeypatch.setitem(FORMATS, "pt2", Format(write, slightly_wrong))
    (file,) = export_model(small.model, tmp_path, ["pt2"])
    assert file.difference == pytest.approx(5e-5, rel=0.05)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda out: out + 1e-3 * (len(out) == 8), r"model\.onnx differs from the model by 0\.001 .* at batch 8"),
        (lambda out: out[:1], r"model\.onnx gives logits of shape \(1, 3\), the model \(8, 3\)"),
        (lambda out: out * float("nan"), r"model\.onnx differs from the model by nan in a logit at batch 1"),
    ],
)
def test_no_file_is_kept_where_one_is_wrong(small, tmp_path, monkeypatch, fault, message):
    model = small.model

    def load(path):
        run = FORMATS["pt2"].load(path)
        return lambda images: fault(run(images))

    monkeypatch.setitem(FORMATS, "onnx", Format(FORMATS["pt2"].write, load))
    with pytest.raises(ValueError, match=message):
        export_model(model, tmp_path / "export")
    assert not list((tmp_path / "export").iterdir())


class OfTwo(nn.Module):
    """Computes something else for a batch of two, so that no one graph can stand for it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, images):
        return images.flatten(1)[:, :3] * self.weight * (2 if len(images) == 2 else 3)


def test_a_network_that_needs_one_batch_size_is_refused(tmp_path):
    model = tiny()
    model.backbone = OfTwo()
    with pytest.raises(ValueError, match="OfTwo cannot be exported with a free batch size"):
        export_model(model, tmp_path, ["pt2"])


def test_refusals_say_what_is_needed(small, tmp_path, monkeypatch):
    model = small.model
    with pytest.raises(ValueError, match="unknown format 'tflite'; formats are pt2, onnx"):
        export_model(model, tmp_path, ["pt2", "tflite"])
    with pytest.raises(ValueError, match="no format given"):
        export_model(model, tmp_path, [])
    with pytest.raises(ValueError, match="must be a PrunedForImageClassification, got Linear"):
        export_model(nn.Linear(1, 1), tmp_path)
    with pytest.raises(ValueError, match=r"weights are torch.bfloat16, .* give model.float\(\)"):
        export_model(copy.deepcopy(model).bfloat16(), tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="taken is a file; give a folder"):
        export_model(model, tmp_path / "taken")
    with pytest.raises(ValueError, match=r"must end in \.pt2 or \.onnx"):
        load_exported(tmp_path / "taken")
    with pytest.raises(FileNotFoundError, match=r"no file .*model\.onnx"):
        load_exported(tmp_path / "model.onnx")
    monkeypatch.setattr("hf_mrpf.export.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx, onnxscript, onnxruntime: pip install hf-mrpf\[export\]"):
        export_model(model, tmp_path / "none")
    with pytest.raises(ImportError, match=r"need onnxruntime: pip install hf-mrpf\[export\]"):
        load_exported(small.folder / "model.onnx")
    assert not (tmp_path / "none").exists()


def test_onnxruntime_gets_the_threads_of_pytorch(small, monkeypatch):
    seen = []
    start = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, **more: seen.append(options) or start(path, options)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    load_exported(small.folder / "model.onnx")
    assert [options.intra_op_num_threads for options in seen] == [3]


def export(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["recipes/export.py", *map(str, options)])
    runpy.run_path(str(REPOSITORY / "recipes/export.py"), run_name="__main__")


@pytest.fixture
def run_folder(small, tmp_path):
    """What recipes/prune.py leaves behind, as far as an export reads it."""
    tiny().save_pretrained(tmp_path / "run/stages/dense/model")
    small.model.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_the_recipe_measures_a_run_beside_its_dense_model(run_folder, monkeypatch, capsys):
    threads, timed = [], {}
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def remember(models, *arguments, **options):
        timed.update(models)
        return measure_latency(models, *arguments, **options)

    monkeypatch.setattr("hf_mrpf.efficiency.measure_latency", remember)
    export(monkeypatch, run_folder, "--batch_sizes", 1, 4, "--rounds", 2, "--threads", 1)
    printed = capsys.readouterr().out
    assert threads == [1]
    assert {path.name for path in (run_folder / "export").iterdir()} == {"model.pt2", "model.onnx", "latency.json"}
    content = json.loads((run_folder / "export/latency.json").read_text())
    times = content["milliseconds"]
    heads, _, *rows = (cells(line) for line in printed.splitlines() if line.startswith("|"))
    runtimes = ["eager", "exported", "onnxruntime"]
    for name, folder in (("dense", run_folder / "stages/dense/model"), ("pruned", run_folder)):
        model = PrunedForImageClassification.from_pretrained(folder)
        images = images_for(model, 3)
        for runtime in runtimes:  # what was timed is what the row says
            with torch.no_grad():
                found = timed.pop(f"{name} {runtime}")(images)
            found = found.logits if runtime == "eager" else found
            torch.testing.assert_close(found, logits(model, images), rtol=0, atol=1e-4)
    assert not timed
    assert heads == ["model", *(f"{runtime}, batch {batch}" for batch in (1, 4) for runtime in runtimes)]
    assert [row[0] for row in rows] == ["dense", "pruned", "dense / pruned"]
    for column, (batch, runtime) in enumerate([(b, r) for b in "14" for r in runtimes], start=1):
        dense, small = (times[batch][name][runtime] for name in ("dense", "pruned"))
        assert small > 0 and dense > 0
        assert [row[column] for row in rows] == [f"{dense:.3g} ms", f"{small:.3g} ms", f"{dense / small:.2f}x"]
    for name in ("pt2", "onnx"):
        file = content["files"][name]
        assert file["bytes"] == (run_folder / "export" / file["name"]).stat().st_size
        assert f"{file['name']}: {file['bytes']:,} bytes, logits within {file['largest_difference']:.2g}" in printed
    assert (content["rounds"], content["threads"], content["image_size"]) == (2, torch.get_num_threads(), 16)
    assert {"torch", "onnx", "onnxruntime", "timm"} <= content["versions"].keys()
    assert "Medians of 2 passes that took turns, 1 thread each" in printed and content["processor"] in printed


def test_the_recipe_measures_a_model_alone_and_says_so(run_folder, tmp_path, monkeypatch, capsys):
    shutil.rmtree(run_folder / "stages")
    options = ("--output_dir", tmp_path / "here", "--formats", "pt2", "--rounds", 1, "--batch_sizes", 2)
    export(monkeypatch, run_folder, *options)
    printed = capsys.readouterr().out
    assert "has no dense parent beside it, so it is measured alone; --dense names one" in printed
    heads, _, *rows = (cells(line) for line in printed.splitlines() if line.startswith("|"))
    assert heads == ["model", "eager, batch 2", "exported, batch 2"] and [row[0] for row in rows] == ["pruned"]
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"model.pt2", "latency.json"}
    assert json.loads((tmp_path / "here/latency.json").read_text())["dense"] is None


def test_the_recipe_exports_weights_of_half_precision_in_single(small, tmp_path, monkeypatch, capsys):
    copy.deepcopy(small.model).bfloat16().save_pretrained(tmp_path / "half")
    export(monkeypatch, tmp_path / "half", "--formats", "pt2", "--rounds", 1, "--batch_sizes", 2)
    assert "The weights are bfloat16; they are exported and measured in float32." in capsys.readouterr().out
    assert load_exported(tmp_path / "half/export/model.pt2")(images_for(small.model, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threads", 0), "--threads must be at least 1, got 0"),
        (("--batch_sizes", 4, 0), "--batch_sizes must be at least 1, got [4, 0]"),
        (("--dense", "other"), "other takes images of 24 pixels and has 3 classes, the model 16 pixels and 3 classes"),
    ],
)
def test_the_recipe_refuses_in_one_line(run_folder, tmp_path, monkeypatch, capsys, options, message):
    tiny(24).save_pretrained(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        export(monkeypatch, "run", *options)
    assert message in capsys.readouterr().err
    assert not (run_folder / "export").exists()
