"""Costs are the textbook's numbers, and measuring them leaves no trace in the model."""

import json
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from hf_mrpf.efficiency import (
    _wait_for,
    count_macs,
    count_parameters,
    device_name,
    file_size,
    measure_latency,
    processor_name,
)


class _Sleeper(nn.Module):
    def __init__(self, milliseconds, log):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.milliseconds, self.log = milliseconds, log

    def forward(self, images):
        assert torch.is_inference_mode_enabled() and not self.training
        self.log.append((self.milliseconds, tuple(images.shape), images.dtype))
        time.sleep(self.milliseconds / 1000)
        return images


def _modes(model):
    return {name: module.training for name, module in model.named_modules()}


def test_macs_of_known_layers():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 7))
    assert count_macs(linear, torch.rand(5, 3, 4, 4)) == 3 * 4 * 4 * 7
    convolution = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
    assert count_macs(convolution, torch.rand(2, 4, 8, 8)) == (4 * 4) * 8 * (4 // 2) * 9


def test_macs_and_parameters_of_resnet18():
    model = timm.create_model("resnet18")
    assert count_parameters(model) == 11_689_512
    assert count_macs(model, torch.rand(1, 3, 224, 224)) == 1_814_073_344


@pytest.mark.parametrize("fused", [True, False])
def test_macs_count_attention(fused, monkeypatch):
    width, tokens, mlp, patch = 64, 17, 128, 8  # 32x32 pixels: 16 patches and the class token
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=patch, embed_dim=width, num_heads=2, depth=2, mlp_ratio=2
    )
    for block in model.blocks:
        block.attn.fused_attn = fused
    linear = tokens * (width * 3 * width + width * width + 2 * width * mlp)
    attention = 2 * tokens * tokens * width
    expected = 16 * (3 * patch * patch) * width + 2 * (linear + attention) + width * 1000
    assert count_macs(model, torch.rand(1, 3, 32, 32)) == expected


def test_counting_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 2))
    model.register_forward_hook(lambda *_: torch.rand(1))  # random also in eval mode
    model.train()
    model[1].eval()  # frozen on purpose
    modes, state = _modes(model), {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    count_macs(model, torch.ones(2, 3, 8, 8))
    assert torch.equal(torch.rand(4), expected)
    assert _modes(model) == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_come_back_after_a_failed_forward():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 5)).train()
    with pytest.raises(RuntimeError):
        count_macs(model, torch.rand(1, 3, 8, 8))
    assert all(_modes(model).values())


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 3, bias=False)
    assert count_parameters(nn.Sequential(layer, layer)) == 9


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8)])
def test_macs_refuse_what_is_no_batch(shape):
    with pytest.raises(ValueError, match=r"batch of images \[N, C, H, W\]"):
        count_macs(nn.Identity(), torch.zeros(shape))


def test_latency_interleaves_and_takes_the_median():
    log = []
    models = {"slow": _Sleeper(6, log).train(), "fast": _Sleeper(1, log).double().train()}
    measured = measure_latency(models, (8, 16), batch_size=2, rounds=3, warmup=1)
    assert list(measured) == ["slow", "fast"]
    assert 6 <= measured["slow"] < 60 and 1 <= measured["fast"] < measured["slow"]
    assert log == [(6, (2, 3, 8, 16), torch.float32), (1, (2, 3, 8, 16), torch.float64)] * 4
    assert models["slow"].training and models["fast"].training


def test_latency_of_what_is_no_module_takes_turns_too():
    log = []

    def function(images):
        log.append((0, tuple(images.shape), images.dtype))

    models = {"module": _Sleeper(1, log).double(), "function": function}
    assert list(measure_latency(models, 8, batch_size=2, rounds=2, warmup=0)) == ["module", "function"]
    assert log == [(1, (2, 3, 8, 8), torch.float64), (0, (2, 3, 8, 8), torch.float32)] * 2


def test_the_processor_has_a_name():
    assert processor_name().strip()


def test_latency_is_the_median_without_warmup(monkeypatch):
    ticks = iter([0, 9.0, 10, 10.002, 20, 20.001, 30, 30.004])  # warm-up 9 s, then 2, 1 and 4 ms
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    measured = measure_latency({"model": nn.Conv2d(3, 1, 1)}, 4, rounds=3, warmup=1)
    assert measured["model"] == pytest.approx(2.0)


def test_latency_waits_for_the_gpu(monkeypatch):
    waits = []
    monkeypatch.setattr("hf_mrpf.efficiency._wait_for", lambda images: waits.append(images.shape[0]))
    measure_latency({"model": nn.Identity()}, 4, batch_size=5, rounds=2, warmup=0)
    assert waits == [5] * 4  # before and after each pass


def test_any_kind_of_accelerator_is_waited_for_and_no_cpu(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    for kind in ("cpu", "mps", "meta"):
        _wait_for(SimpleNamespace(device=torch.device(kind)))
    assert waits == [torch.device("mps")]
    assert device_name(torch.device("mps")) == f"{processor_name()}, by mps"


def test_latency_is_measured_where_the_model_is_whatever_device_is_the_default():
    models = {"model": nn.Flatten(), "weighted": nn.Sequential(nn.Flatten(), nn.Linear(48, 2))}
    with torch.device("meta"):
        assert measure_latency(models, 4, rounds=1, warmup=0).keys() == models.keys()


def test_latency_refuses_nonsense():
    with pytest.raises(ValueError, match="at least one model"):
        measure_latency({}, 8)
    with pytest.raises(ValueError, match=r"rounds and batch_size must be at least 1.*rounds=0"):
        measure_latency({"model": nn.Identity()}, 8, rounds=0)


def test_file_size_of_whole_and_sharded_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        file_size(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "b.safetensors").write_bytes(b"x" * 5)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"p": "a.safetensors", "q": "b.safetensors", "r": "a.safetensors"}}))
    assert file_size(tmp_path) == file_size(index) == 15
    (tmp_path / "model.safetensors").write_bytes(b"x" * 7)
    assert file_size(tmp_path) == file_size(tmp_path / "model.safetensors") == 7
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        file_size(index)
