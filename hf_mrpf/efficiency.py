"""What a model costs, measured: multiply-accumulates, parameters, milliseconds, bytes on disk."""

import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .modes import eval_mode, frozen


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Count the multiply-accumulates of one forward pass on ONE image.

    Convolutions, matrix products and attention products are counted, by PyTorch's own `FlopCounterMode` (two FLOPs are
    one MAC); norms, activations and pooling are not. Fused and plain attention give the same count. The model's modes,
    its BatchNorm statistics and the random state are left as they were.

    Args:
        model (`nn.Module`):
            Model that takes images. It is run once, in eval mode, without gradients.
        example (`torch.Tensor` of shape `[N, C, H, W]`):
            Images of the size that counts, on the model's device. Only the first is used, so `N` changes nothing.

    Returns:
        `int`: multiply-accumulates per image.
    """
    if example.ndim != 4 or example.shape[0] == 0:
        raise ValueError(f"example must be a batch of images [N, C, H, W] with N >= 1, got shape {list(example.shape)}")
    devices = [example.device] if example.device.type == "cuda" else []
    counter = FlopCounterMode(display=False)
    # torch 2.11 has no formula for fused attention on a CPU; the plain kernel is counted everywhere, and the same.
    plain = sdpa_kernel(SDPBackend.MATH)
    # The counter fails on views of parameters that want gradients.
    with eval_mode(model), frozen(model), torch.random.fork_rng(devices), torch.no_grad(), plain, counter:
        model(example[:1])
    return counter.get_total_flops() // 2


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of a model, each shared one once. Buffers (BatchNorm statistics) are not parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def measure_latency(
    models: Mapping[str, nn.Module | Callable[[Tensor], object]],
    image_size: int | tuple[int, int],
    batch_size: int = 1,
    *,
    rounds: int = 20,
    warmup: int = 3,
) -> dict[str, float]:
    """Measure the median time of a forward pass of several models, side by side.

    The models take turns, one forward each a round, so that a machine that speeds up or slows down meanwhile does so
    for all of them: compare only figures of one call. Each model runs on its own device and in its own dtype, in eval
    mode and `inference_mode`, on the same random images; a GPU is waited for before and after each pass. Every
    module's mode and the random state are left as they were.

    Args:
        models (`Mapping[str, nn.Module or Callable]`):
            Models by name. What is no `nn.Module`, such as an exported model of [`load_exported`], is called as it is,
            on float32 images on the CPU.
        image_size (`int` or `tuple[int, int]`):
            Height and width in pixels (one number for both) of the 3-channel images.
        batch_size (`int`, *optional*, defaults to `1`):
            Images per pass.
        rounds (`int`, *optional*, defaults to `20`):
            Timed passes of each model, of which the median is reported.
        warmup (`int`, *optional*, defaults to `3`):
            Untimed passes of each model before.

    Returns:
        `dict[str, float]`: median milliseconds per pass (per batch, not per image), by name.
    """
    if not models:
        raise ValueError("measure_latency needs at least one model, e.g. {'dense': dense, 'pruned': pruned}")
    if rounds < 1 or warmup < 0 or batch_size < 1:
        raise ValueError(
            f"rounds and batch_size must be at least 1 and warmup at least 0, "
            f"got rounds={rounds}, batch_size={batch_size}, warmup={warmup}"
        )
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    noise = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, 3, height, width, generator=noise, device="cpu", dtype=torch.float32)
    timed = latency_rounds(models, images, rounds=rounds, warmup=warmup)
    return {name: statistics.median(passes) for name, passes in timed.items()}


def latency_rounds(
    models: Mapping[str, nn.Module | Callable[[Tensor], object]],
    images: Tensor,
    *,
    rounds: int,
    warmup: int = 3,
    seconds: float = 0.0,
    most: int | None = None,
) -> dict[str, list[float]]:
    """
    Time passes as [`measure_latency`] does, on given images, and tell the milliseconds of every round.

    Args:
        models (`Mapping`), warmup (`int`): as there.
        images (`torch.Tensor` of shape `[N, C, H, W]`): a batch for each model's pass.
        rounds (`int`): timed passes of each model, at least.
        seconds (`float`, *optional*, defaults to 0): further rounds follow until all passes have taken this.
        most (`int`, *optional*): where the further rounds end anyway.

    Returns:
        `dict[str, list[float]]`: as many times for each name.
    """
    modules = {name: model for name, model in models.items() if isinstance(model, nn.Module)}
    inputs = {name: images.to(_reference(modules[name])) if name in modules else images for name in models}
    times: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as modes, torch.inference_mode():
        for module in modules.values():
            modes.enter_context(eval_mode(module))
        done, spent = -warmup, 0.0
        while done < rounds or (spent < seconds and (most is None or done < most)):
            for name, model in models.items():
                times[name].append(1000 * _seconds(model, inputs[name]))
                spent += times[name][-1] / 1000
            done += 1
    return {name: passes[warmup:] for name, passes in times.items()}


def file_size(path: str | Path) -> int:
    """Bytes of a model's weights on disk.

    Args:
        path (`str` or `Path`):
            A checkpoint folder, its `model.safetensors`, or the `model.safetensors.index.json` of a sharded one, whose
            shards are summed.

    Raises:
        `FileNotFoundError`: there are no such weights, or a shard that the index names is missing.
    """
    path = Path(path)
    if path.is_dir():
        whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
        if not whole.is_file() and not index.is_file():
            raise FileNotFoundError(f"{path} holds neither model.safetensors nor model.safetensors.index.json")
        path = whole if whole.is_file() else index
    if path.suffix != ".json":
        return path.stat().st_size
    shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    return sum((path.parent / shard).stat().st_size for shard in shards)


def processor_name() -> str:
    """What the machine calls its processor, for a reader of latencies; the architecture where it tells no more."""
    # Python's own answer is empty on most Linux systems.
    listing = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", listing.read_text(), re.MULTILINE) if listing.is_file() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """What a run's times were measured on: the GPU, or the processor and how many threads of it PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{processor_name()}, by {device.type}"
    return f"{processor_name()}, {torch.get_num_threads()} of its threads"


def has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; with AVX-512 alone oneDNN imitates them, and is slower."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _seconds(model: Callable[[Tensor], object], images: Tensor) -> float:
    _wait_for(images)
    start = time.perf_counter()
    model(images)
    _wait_for(images)
    return time.perf_counter() - start


def _wait_for(images: Tensor) -> None:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and images.device.type == accelerator.type:
        torch.accelerator.synchronize(images.device)


def _reference(model: nn.Module) -> Tensor:
    """A tensor on the device and in the dtype that the model computes in."""
    floating = (parameter for parameter in model.parameters() if parameter.is_floating_point())
    return next(floating, torch.zeros((), device="cpu"))
