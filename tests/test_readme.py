"""What the README says runs."""

import re
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_mrpf import MRPFConfig, MRPFTrainer, PrunedForImageClassification, export_model, load_image_data

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_example_makes_a_smaller_model_and_its_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shorter = BLOCKS[0]
    for whole, part in (
        ('"digits")', '"digits", max_train_samples=64, max_eval_samples=20)'),
        (
            "num_train_epochs=10",
            "max_steps=1, use_cpu=True, num_steps=1, eval_num_steps=1, calibration_sets=1, calibration_set_size=32",
        ),
    ):
        assert whole in shorter
        shorter = shorter.replace(whole, part)
    names: dict = {}
    exec(compile(shorter, "README.md", "exec"), names)
    assert (tmp_path / "outputs/example/mrs.png").stat().st_size > 10_000
    loaded = PrunedForImageClassification.from_pretrained(tmp_path / "outputs/example")
    assert sum(p.numel() for p in loaded.parameters()) == names["plan"].after["params"]
    assert names["plan"].achieved["macs"] == pytest.approx(0.5, abs=0.02)


def test_the_hooks_of_the_readme_fire(tmp_path, capsys):
    (block,) = (block for block in BLOCKS if "TrainerCallback" in block)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    (callback,) = (
        value
        for value in names.values()
        if isinstance(value, type) and issubclass(value, TrainerCallback) and value is not TrainerCallback
    )
    data = load_image_data(max_train_samples=60, max_eval_samples=20)
    torch.manual_seed(0)
    model = PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8)
    )
    args = MRPFConfig(str(tmp_path), use_cpu=True, calibration_sets=2, calibration_set_size=16, num_steps=1, eps=0.1)
    MRPFTrainer(model, args, train_dataset=data.train, callbacks=[callback()]).prune()
    printed = capsys.readouterr().out
    assert "is the most critical module" in printed
    assert "'macs': 0.5" in printed or "'macs': 0.4" in printed
    assert "parameters left" in printed


def test_the_exported_file_runs_as_the_readme_says(tmp_path, monkeypatch, capsys):
    (block,) = (block for block in BLOCKS if "onnxruntime" in block)
    model = PrunedForImageClassification.from_backbone(
        "timm/resnet18", id2label={0: "zero"}, image_size=16, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8)
    )
    export_model(model, tmp_path / "outputs/digits/export", ["onnx"])
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out == f"{['zero'] * 8}\n"


def test_every_command_and_file_the_readme_names_exists():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
    for script in re.findall(r"recipes/\w+\.py", README):
        assert (REPOSITORY / script).is_file()
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (REPOSITORY / picture).is_file()
