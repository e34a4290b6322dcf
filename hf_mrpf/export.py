"""For deployment: a `.pt2` of `torch.export` and an `.onnx`, each checked against the model before it gets its name."""

import copy
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .modeling import PrunedConfig, PrunedForImageClassification

TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 8)
# A batch of one would be taken for a constant.
_TRACED_BATCH = 2


class Format(NamedTuple):
    """How a kind of file is written, with strings of metadata, and read as a function of images."""

    write: Callable[[ExportedProgram, Path, dict[str, str]], None]
    load: Callable[[Path], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class ExportedFile:
    """
    A file that [`export_model`] wrote.

    Args:
        format (`str`):
            `"pt2"` or `"onnx"`.
        path (`Path`):
            Where it lies.
        size (`int`):
            Bytes.
        difference (`float`):
            Largest absolute difference of a logit from the model's, over batches of 1 and of 8 random images.
    """

    format: str
    path: Path
    size: int
    difference: float


def export_model(
    model: PrunedForImageClassification, output_dir: str | Path, formats: Iterable[str] = ("pt2", "onnx")
) -> list[ExportedFile]:
    r"""
    Write a model, dense or pruned, as files that run without this library.

    Both take `pixel_values`, float32 of shape `(batch, 3, image_size, image_size)` in [0, 1], any batch from 1 up, and
    give `logits` of shape `(batch, num_labels)`; normalisation is inside. The names of the classes and the image size
    are in the metadata: of the ONNX file under `id2label` (a JSON object) and `image_size`, of the `.pt2` as
    `extra_files` of these names. Each file is read again and compared with the model at batch 1 and 8 before it gets
    its name: a file of an earlier export is replaced by a right one or stays. The model is left as it was, in its mode
    and on its device.

    Args:
        model ([`PrunedForImageClassification`]):
            A model with float32 weights. It is exported in eval mode, for the CPU.
        output_dir (`str` or `Path`):
            Folder for `model.pt2` and `model.onnx`; made if it does not exist.
        formats (`Iterable[str]`, *optional*, defaults to `("pt2", "onnx")`):
            Which of the two to write.

    Returns:
        `list[ExportedFile]`: path, size and measured difference of each file, in the order of `formats`.

    Raises:
        ValueError: for another kind of model or weights, an unknown format, a network that cannot be exported with a
            free batch size, and a file whose logits are not within 1e-4 of the model's: then no file is kept.
        ImportError: for `"onnx"` without onnx, onnxscript and onnxruntime (`pip install hf-mrpf[export]`).
    """
    formats = _checked_formats(formats)
    _check_model(model)
    if "onnx" in formats:
        _require("onnx", "onnxscript", "onnxruntime")
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir {output_dir} is a file; give a folder.")
    output_dir.mkdir(parents=True, exist_ok=True)

    network = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    size = model.config.image_size
    noise = torch.Generator().manual_seed(0)
    images = torch.rand(max(CHECKED_BATCHES), 3, size, size, generator=noise, device="cpu", dtype=torch.float32)
    metadata = {"id2label": json.dumps(model.config.id2label), "image_size": str(size)}
    program = _export(network, images[:_TRACED_BATCH])
    written = []
    # On the same disk, so that moving a checked file to its place is one step.
    with TemporaryDirectory(prefix=".export-", dir=output_dir) as drafts:
        for name in formats:
            draft, path = (Path(folder) / f"model.{name}" for folder in (drafts, output_dir))
            FORMATS[name].write(program, draft, metadata)
            difference = _largest_difference(load_exported(draft), network, images, path)
            written.append(ExportedFile(name, path, draft.stat().st_size, difference))
        for file in written:
            os.replace(Path(drafts) / file.path.name, file.path)
    return written


def load_exported(path: str | Path) -> Callable[[Tensor], Tensor]:
    r"""
    Read a file of [`export_model`] as a function of images.

    Args:
        path (`str` or `Path`):
            A `.pt2` or `.onnx` file. Loading a `.pt2` runs PyTorch's unpickler on parts of it: load only one that you
            wrote or whose source you trust.

    Returns:
        Function of images `(N, 3, image_size, image_size)`, float32 in [0, 1] on the CPU, that gives their logits
        `(N, num_labels)`. An ONNX file runs on as many threads as PyTorch has when it is loaded.

    Raises:
        ValueError: for another ending.
        OSError: there is no such file.
        ImportError: for `.onnx` without onnxruntime (`pip install hf-mrpf[export]`).
    """
    path = Path(path)
    if path.suffix[1:] not in FORMATS:
        raise ValueError(f"{path} is no exported model: its name must end in {' or '.join(f'.{n}' for n in FORMATS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; write it with export_model or recipes/export.py.")
    return FORMATS[path.suffix[1:]].load(path)


class _Logits(nn.Module):
    """The model with a plain tensor for its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values, return_dict=False)[0]


def _checked_formats(formats: Iterable[str]) -> Sequence[str]:
    names = [formats] if isinstance(formats, str) else list(dict.fromkeys(formats))
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        given = f"unknown format {unknown[0]!r}" if unknown else "no format given"
        raise ValueError(f"{given}; formats are {', '.join(FORMATS)}")
    return names


def _check_model(model: Any) -> None:
    if getattr(getattr(model, "config", None), "model_type", None) != PrunedConfig.model_type:
        raise ValueError(
            f"model must be a PrunedForImageClassification, got {type(model).__name__}: "
            "make one with PrunedForImageClassification.from_backbone"
        )
    other = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if other:
        raise ValueError(f"the model's weights are {other.pop()}, exports are compared in float32: give model.float()")


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX files need {', '.join(missing)}: pip install hf-mrpf[export]")


def _export(network: PrunedForImageClassification, images: Tensor) -> ExportedProgram:
    shapes = {"pixel_values": {0: Dim("batch")}}
    try:
        program = torch.export.export(_Logits(network), (images,), dynamic_shapes=shapes)
    except RuntimeError as error:
        name = type(network.backbone).__name__
        raise ValueError(f"{name} cannot be exported with a free batch size: {error}") from error
    # Else both files would hold the source lines of every step, with the paths of this machine.
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _write_pt2(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    torch.export.save(program, path, extra_files=metadata)


def _write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    shapes = {"pixel_values": {0: "batch"}}  # the program has a free batch; this is its name in the file
    try:
        converted: Any = torch.onnx.export(
            program, (), input_names=["pixel_values"], output_names=["logits"], dynamic_shapes=shapes, dynamo=True,
            verbose=False,
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(f"the network cannot be written as ONNX: {error}") from error
    converted.model.metadata_props.update(metadata)
    converted.save(path, external_data=False)


def _load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(path).module()
    # A plain function, because an exported module refuses eval(), which it does not need.
    return lambda images: module(images)


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait busily between two calls would take the cores from whatever runs in turn with this model.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])


@torch.no_grad()
def _largest_difference(exported: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, path: Path) -> float:
    """Largest absolute difference over the checked batches; a ValueError where it is more than an export may have."""
    differences = []
    for batch in CHECKED_BATCHES:
        expected, found = model(images[:batch], return_dict=True).logits, exported(images[:batch])
        if found.shape != expected.shape:
            raise ValueError(
                f"{path.name} gives logits of shape {tuple(found.shape)}, the model {tuple(expected.shape)}: the file "
                "is wrong and is not kept. Export with another version of torch, or another format."
            )
        difference = (found - expected).abs().max().item()
        # Not the other way round: NaN is above nothing.
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{path.name} differs from the model by {difference:.3g} in a logit at batch {batch}, more than "
                f"{TOLERANCE:g} (nan: the logits are no numbers): the file is wrong and is not kept. Export with "
                "another version of torch, or another format."
            )
        differences.append(difference)
    return max(differences)


FORMATS: dict[str, Format] = {"pt2": Format(_write_pt2, _load_pt2), "onnx": Format(_write_onnx, _load_onnx)}
