"""The model: a timm or transformers classifier that takes pixels in [0, 1] and knows how it was pruned.

This file is copied beside the weights of every saved model (`trust_remote_code`), so it imports nothing of `hf_mrpf`.
"""

import copy
import difflib
import inspect
import json
import logging
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils import cached_file

# fmt: off
# What a pruning record may set on a module, besides tensors: sizes, and the softmax scale that follows from one.
SIZE_ATTRIBUTES = frozenset({
    "in_channels", "out_channels", "groups", "num_channels", "num_groups", "in_features", "out_features",
    "num_features", "head_hidden_size", "normalized_shape", "num_heads", "num_attention_heads", "head_dim",
    "attention_head_size", "all_head_size", "attn_dim", "embed_dim", "dim", "out_dim", "hidden_size", "scale",
    "scaling"
})
# Settings that change nothing of what a trained network computes; nor do rates of dropout and of stochastic depth.
_WITHOUT_EFFECT = frozenset(
    {"training", "inplace", "momentum", "fused_attn", "gradient_checkpointing", "grad_checkpointing"}
)
# Arguments that would reach files, the network or another device, or that this class sets itself.
_REFUSED_TIMM_KWARGS = frozenset({
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn",
    "pretrained_model_args", "checkpoint_path", "cache_dir", "kwargs_filter", "num_classes", "features_only",
    "feature_cfg", "out_indices", "pruned", "scriptable", "exportable", "no_jit", "device", "dtype"
})
# Keys of a transformers config that are not the network's, or would fetch code.
_DROPPED_CONFIG_KEYS = frozenset({
    "id2label", "label2id", "num_labels", "auto_map", "transformers_version", "_name_or_path", "name_or_path",
    "dtype", "torch_dtype", "attn_implementation", "experts_implementation", "quantization_config"
})
# fmt: on
# Far above any honest network, and what a machine stands: a recipe is refused before it costs time or memory.
_MOST_MODULES, _LARGEST_INTEGER, _LARGEST_IMAGE, _MOST_LABELS = 10_000, 2**18, 8192, 2**16
_RECIPE_FIELDS: dict[str, dict[str, type]] = {"timm": {"name": str, "kwargs": dict}, "transformers": {"config": dict}}
# Wrappers of other libraries' checkpoints: their configs name files and repositories.
_REFUSED_MODEL_TYPES = ("mrpf", "timm_wrapper")
_ABSENT = object()
_LOGGER = logging.getLogger("hf_mrpf")
_NEW_HEAD = "load it as it is and give it a new head by hf_mrpf.with_new_head(model, id2label)"
# Of what config.json holds; higher ones are not read.
FORMAT = 1
# What constructors of networks and configs raise for arguments that do not fit.
_BUILD_ERRORS = (
    AssertionError, AttributeError, LookupError, ArithmeticError, RuntimeError, TypeError, ValueError,
    StrictDataclassError,
)  # fmt: skip


class PrunedConfig(PreTrainedConfig):
    r"""
    Configuration of [`PrunedForImageClassification`]: everything but the weights, as plain JSON.

    Args:
        backbone (`dict`, *optional*):
            Recipe of the dense network: `{"source": "timm", "name": "resnet18", "kwargs": {...}}` or
            `{"source": "transformers", "config": {"model_type": "resnet", ...}}`. Defaults to timm's ResNet-18.
        image_size (`int`, *optional*, defaults to 224):
            Height and width of the images in pixels.
        image_mean (`list[float]`, *optional*, defaults to `[0.0, 0.0, 0.0]`):
            Mean of each channel, of pixels in [0, 1]; the model subtracts it.
        image_std (`list[float]`, *optional*, defaults to `[1.0, 1.0, 1.0]`):
            Standard deviation of each channel, above 0; the model divides by it.
        small_images (`bool`, *optional*, defaults to `False`):
            Whether the backbone has the form for images of CIFAR's size (see [`SMALL_IMAGE_FORMS`]).
        pruning (`dict`, *optional*):
            What [`describe_pruning`] says of the model, `None` for a dense one. Saving a model refreshes it.
        mrpf_format (`int`, *optional*, defaults to 1):
            Version of these keys; a higher one than this library knows is refused.

    Raises:
        ValueError: for a value of another kind, naming the key.
    """

    model_type = "mrpf"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        image_size: int = 224,
        image_mean: Iterable[float] = (0.0, 0.0, 0.0),
        image_std: Iterable[float] = (1.0, 1.0, 1.0),
        small_images: bool = False,
        pruning: dict[str, Any] | None = None,
        mrpf_format: int = FORMAT,
        **kwargs: Any,
    ) -> None:
        if isinstance(mrpf_format, bool) or not isinstance(mrpf_format, int) or not 1 <= mrpf_format <= FORMAT:
            raise ValueError(
                f"mrpf_format is {reprlib.repr(mrpf_format)}, and formats up to {FORMAT} are known: a newer hf_mrpf "
                "saved this. Update hf_mrpf, or load with trust_remote_code=True, which reads it by the file beside it"
            )
        self.mrpf_format = mrpf_format
        self.backbone = _checked_recipe(
            {"source": "timm", "name": "resnet18", "kwargs": {}} if backbone is None else backbone
        )
        if not _is_size(image_size):
            raise ValueError(f"image_size must be a positive integer (pixels), got {image_size!r}")
        if image_size > _LARGEST_IMAGE:
            raise ValueError(f"image_size is {reprlib.repr(image_size)}, more than {_LARGEST_IMAGE} pixels")
        self.image_size = image_size
        self.image_mean = _checked_channels("image_mean", image_mean)
        self.image_std = _checked_channels("image_std", image_std, positive=True)
        if not isinstance(small_images, bool):
            raise ValueError(f"small_images must be true or false, got {small_images!r}")
        self.small_images = small_images
        if pruning is not None and not isinstance(pruning, dict):
            raise ValueError(f"pruning must be null or an object of 'shapes' and 'attrs', got {reprlib.repr(pruning)}")
        self.pruning = pruning
        _check_common(kwargs)
        super().__init__(**kwargs)
        if not self.num_labels:
            raise ValueError("id2label must name at least one class")
        _check_numbered(self.id2label)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, which would silently take the defaults where there is no `config.json`."""
        with _connected(pretrained_model_name_or_path):
            try:
                values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            except (TypeError, AttributeError) as error:
                raise ValueError(f"{pretrained_model_name_or_path}: config.json holds no object: {error}") from error
        if not values:
            raise OSError(f"{pretrained_model_name_or_path} holds no config.json")
        return values, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; every refusal of the values is a `ValueError` that names the file and the key."""
        values = config_dict if isinstance(config_dict, dict) else {}  # transformers refuses what is none
        kind = values.get("model_type", cls.model_type)
        if kind != cls.model_type or "pretrained_cfg" in values:  # timm's files have no model_type
            saved_by = "timm" if "pretrained_cfg" in values else f"model_type {reprlib.repr(kind)}"
            raise ValueError(
                f"config.json: this is a model of {saved_by}, and only saved models of this class are loaded "
                f"({cls.model_type!r}): start from that one by PrunedForImageClassification.from_backbone"
            )
        try:
            _check_number_kept(super().from_dict, config_dict, kwargs)
            return super().from_dict(config_dict, **kwargs)
        except _BUILD_ERRORS as error:
            raise ValueError(f"config.json: {error}") from error

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json` and `preprocessor_config.json` (for `pipeline`); arguments as in transformers."""
        # Saving a model runs this in its middle, so that this file is among those that are pushed.
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": 2,  # bilinear
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": False,  # the model normalises
        }
        (Path(save_directory) / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


class PrunedForImageClassification(PreTrainedModel):
    r"""
    An image classifier that normalises inside and can be pruned, saved and loaded like any transformers model.

    `model.backbone` is the plain timm or transformers network. Make one with [`from_backbone`] or `from_pretrained`;
    `PrunedForImageClassification(config)` has random weights in the shapes of the config's pruning record.

    Raises:
        ValueError: for a recipe, an image size or a pruning record that cannot work, before memory is spent on weights.
    """

    config_class = PrunedConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    accepts_loss_kwargs = False
    _supports_sdpa = True

    config: PrunedConfig
    backbone: nn.Module
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: PrunedConfig, network: nn.Module | None = None) -> None:
        eager = config._attn_implementation == "eager"
        super().__init__(config)
        try:
            with torch.device("meta"), _bounded_depth():
                plan = _build_backbone(config, eager)
            if config.pruning is not None:
                _apply_record(plan, config.pruning)
            _check_forward(plan, config)
        except ValueError as error:
            if config.name_or_path:
                raise ValueError(f"{config.name_or_path}: config.json: {error}") from error
            raise

        if network is None:
            network = _build_backbone(config, eager)
            if config.pruning is not None:
                _apply_record(network, config.pruning)
        self.backbone = network
        # Loading leaves non-persistent buffers (such as Swin's relative position index) uninitialised.
        for module in network.modules():
            module._non_persistent_buffers_set.clear()
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(getattr(config, name), dtype=torch.float32))
        self._no_split_modules = [type(network).__name__]
        self.supports_gradient_checkpointing = _can_checkpoint(network)
        self._statistics_hooks: list[RemovableHandle] = []
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedConfig | PreTrainedModel,
        *,
        num_labels: int | None = None,
        id2label: dict[int, str] | list[str] | None = None,
        image_size: int | None = None,
        small_images: bool = False,
        pretrained: bool = False,
        image_mean: Iterable[float] | None = None,
        image_std: Iterable[float] | None = None,
        revision: str | None = None,
        **backbone_kwargs: Any,
    ) -> Self:
        r"""
        Make a dense model, ready to be trained and pruned.

        Args:
            backbone (`str`, `PreTrainedConfig` or `PreTrainedModel`):
                `"timm/resnet18"` or `"resnet18"` (random weights unless `pretrained`), `"timm/resnet18.a1_in1k"`
                (those weights), a Hub id or folder in the format of transformers or of timm (its weights), a
                transformers config (random weights), or a transformers image classification model (its weights are
                copied). Weights are read from safetensors only.
            num_labels (`int`, *optional*):
                Number of classes. Defaults to `id2label`'s, then to the backbone's own; a different number means a
                new, random head.
            id2label (`dict[int, str]` or `list[str]`, *optional*):
                Name of each class; classes are numbered from 0.
            image_size (`int`, *optional*):
                Height and width in pixels. Defaults to the backbone's own, 224 where it has none.
            small_images (`bool`, *optional*, defaults to `False`):
                Give the backbone the form for images of CIFAR's size: a ResNet gets a 3x3 stem of stride 1 without
                max-pooling, a VGG a linear head on its 512 features, a MobileViT strides of 1 in its first layers, so
                that its last map has at least 4x4 pixels at 32 and at 64. A ViT or a Swin needs none: give it
                `image_size` with `patch_size` and, for Swin, `window_size`.
            pretrained (`bool`, *optional*, defaults to `False`):
                Download timm's default weights of the architecture.
            image_mean, image_std (`list[float]`, *optional*):
                Normalisation of each channel, for pixels in [0, 1]. Default to the backbone's own where weights are
                downloaded, else to 0 and 1.
            revision (`str`, *optional*):
                Branch, tag or commit of the weights on the Hub.
            backbone_kwargs:
                Arguments of the timm constructor, or attributes of the transformers config; JSON values only.

        Raises:
            ValueError: for an unknown name (close ones are listed), a plain `nn.Module`, contradicting labels, a size
                or an argument the backbone cannot work with, or weights that are not all the backbone's.
            OSError: for weights that cannot be fetched, or are there as a pickle only.
        """
        if id2label is not None:
            id2label = _checked_names(id2label)
        if id2label is not None and num_labels not in (None, len(id2label)):
            raise ValueError(f"num_labels is {num_labels}, but id2label names {len(id2label)} classes")
        labels = len(id2label) if id2label is not None else num_labels
        if labels is not None and not _is_size(labels):
            raise ValueError(f"num_labels must be a positive integer, got {labels!r}")
        if isinstance(backbone, str):
            name = _timm_name(backbone)
            start = (
                _from_hub(backbone, labels, image_size, backbone_kwargs, revision, None not in (image_mean, image_std))
                if name is None
                else _from_timm_name(name, labels, image_size, backbone_kwargs, revision, pretrained=pretrained)
            )
        elif isinstance(backbone, PreTrainedModel):
            start = _from_transformers_model(backbone, labels, image_size, backbone_kwargs)
        elif isinstance(backbone, PreTrainedConfig):
            start = _from_transformers_config(backbone, labels, image_size, backbone_kwargs)
        else:
            raise ValueError(
                f"backbone must be a timm name, a transformers id, config or image classification model, got "
                f"{type(backbone).__name__}: a network without a known recipe could not be built again on loading"
            )
        network = start.pop("network", None)
        given = {"id2label": id2label, "image_mean": image_mean, "image_std": image_std}
        start |= {key: value for key, value in given.items() if value is not None}
        if id2label is not None:
            start["label2id"] = {label: index for index, label in id2label.items()}
        config = cls.config_class(small_images=small_images, **start)
        if network is not None and small_images:
            _fit_small_images(network, config.image_size)
        model: Any = cls(config, network)
        return model if network is None else model.to(device=next(network.parameters()).device)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        r"""
        Classify images.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, 3, H, W)`):
                Floating point pixels in [0, 1]; the model normalises them.
            labels (`torch.Tensor` of shape `(N,)`, *optional*):
                Class indices; with them the output has the mean cross-entropy as `loss`.
            return_dict (`bool`, *optional*):
                `False` for a tuple `(loss, logits)`, without the loss where there are no labels.

        Returns:
            [`~transformers.modeling_outputs.ImageClassifierOutput`] with `logits` of shape `(N, num_labels)`.

        Raises:
            ValueError: for integer pixels, another shape, or no tensor. The range is not checked: that would wait for
                the device.
        """
        if not isinstance(pixel_values, Tensor):
            raise ValueError(
                "pixel_values must be a tensor of shape (N, 3, H, W), floating point in [0, 1], got "
                f"{type(pixel_values).__name__}: an image file is read by pipeline or AutoImageProcessor"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floating point in [0, 1], got {pixel_values.dtype}: divide 8-bit pixels by 255"
            )
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values must have shape (N, 3, H, W), got {tuple(pixel_values.shape)}: "
                "convert greyscale images to RGB"
            )
        pixels = (pixel_values - self.image_mean.view(3, 1, 1)) / self.image_std.view(3, 1, 1)
        # A replica of `nn.DataParallel` has no parameters to ask.
        dtype = _dtype_of_replica(self) if "_is_replica" in vars(self) else self.dtype
        logits = _logits(self.backbone(pixels.to(dtype)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if return_dict is False or (return_dict is None and not self.config.return_dict):
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load a saved model, dense or pruned, strictly and from safetensors only; arguments as in transformers.

        Raises:
            ValueError: for a file that is damaged, lacks a tensor, has one too many or of another shape, or holds NaN,
                and for a config that cannot work: the message names file and key.
            OSError: for a missing file.
        """
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise ValueError(f"ignore_mismatched_sizes: these models load strictly; {_NEW_HEAD}")
        source = pretrained_model_name_or_path
        kwargs |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            with _connected(source):
                _check_index(source, kwargs)
                loaded: Any = super().from_pretrained(source, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{source}: {_damaged_file(source)} cannot be read: {error}") from error
        model, info = loaded
        _check_loaded(model, info, source)
        _align(model)
        return loaded if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        # The model is still without memory here: the shapes that config.json claims must be those in the files first.
        if checkpoint_files is not None:  # an index may name none
            _check_headers(model, checkpoint_files)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write weights (safetensors), `config.json` with the pruning record of the model as it now is,
        `preprocessor_config.json` and this file; arguments as in transformers.

        Raises:
            ValueError: for a model that could not be loaded again as it is, see [`describe_pruning`], or whose config
                does not go with it.
        """
        self.update_pruning_record()
        _check_can_load(self)
        # The record speaks of the model's own tensor names.
        kwargs.setdefault("save_original_format", False)
        push = kwargs.pop("push_to_hub", False)
        names = ("repo_id", "private", "token", "revision", "commit_message", "tags") if push else ()
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        if push and (others := sorted({"create_pr", "commit_description"} & kwargs.keys())):
            raise ValueError(
                f"{', '.join(others)}: a push here is one commit to a branch; give revision, or leave it out"
            )
        hub |= {"max_shard_size": kwargs["max_shard_size"]} if push and "max_shard_size" in kwargs else {}
        super().save_pretrained(save_directory, *args, **kwargs)
        if push:  # in its own way: transformers would send another card
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)

    def update_pruning_record(self) -> None:
        """Have `config.pruning` say how the model is pruned now; [`prune`] and saving do so.

        Raises:
            ValueError: as [`describe_pruning`].
        """
        self.config.pruning = describe_pruning(self)

    def initialize_weights(self) -> None:
        """Do nothing: the backbone's constructor initialises it, and trained weights must stay."""

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, for the same reason."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(bfloat16)` and `.half()` come through here: the statistics stay exact.
        exact = {name: self._buffers[name] for name in ("image_mean", "image_std")}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        network: Any = self.backbone
        if isinstance(network, PreTrainedModel):
            network._set_gradient_checkpointing(enable, *args, **kwargs)
        else:
            network.set_grad_checkpointing(enable)
        for hook in self._statistics_hooks:
            hook.remove()
        self._statistics_hooks = _keep_statistics(network) if enable else []


def check_class(model: nn.Module) -> None:
    """Refuse a model whose class is not this one but that of the file beside its weights: none of its checks apply."""
    for part in model.modules():
        is_ours = isinstance(part, PreTrainedModel) and part.config.model_type == PrunedConfig.model_type
        if is_ours and not isinstance(part, PrunedForImageClassification):
            raise ValueError(
                f"the model was loaded by the checkpoint's own code ({type(part).__module__}), not by the installed "
                "hf_mrpf: import hf_mrpf first and load it again"
            )


def describe_pruning(model: PrunedForImageClassification) -> dict[str, Any] | None:
    r"""
    Say how a model differs in size from the dense backbone of its recipe. In nothing else may it differ, but in what
    matters to training alone: modes, gradient checkpointing, momentum, rates of dropout and stochastic depth. Those
    are not kept.

    Args:
        model ([`PrunedForImageClassification`]):
            A dense or pruned model.

    Returns:
        `{"shapes": {tensor: shape}, "attrs": {module: {attribute: value}}}` with everything that differs, under the
        names of `model.state_dict()` and `model.named_modules()`; `None` for a dense model.

    Raises:
        ValueError: if the backbone has other tensors than its recipe, or larger ones, or larger sizes, or a module of
            another class or with another setting (such as a stride): another network would be loaded. The module is
            named.
    """
    with torch.device("meta"):
        dense = _build_backbone(model.config)
    before = {name: list(tensor.shape) for name, tensor in _tensors(dense).items()}
    after = {name: list(tensor.shape) for name, tensor in _tensors(model.backbone).items()}
    if before.keys() != after.keys():
        names = ", ".join(sorted(before.keys() ^ after.keys())[:5])
        raise ValueError(f"the backbone and its recipe {_recipe_name(model.config)} differ in tensors: {names}")
    _check_same_network(dense, model)
    shapes = {name: shape for name, shape in after.items() if shape != before[name]}
    sizes = _sizes(dense)
    attrs = {
        module: changed
        for module, now in _sizes(model.backbone).items()
        if (changed := {key: now[key] for key in sorted(now) if now[key] != sizes.get(module, now).get(key, now[key])})
    }
    if not shapes and not attrs:
        return None
    record = {"shapes": shapes, "attrs": attrs}
    _apply_record(dense, record)  # what loading would refuse
    return record


def _check_same_network(dense: nn.Module, model: PrunedForImageClassification) -> None:
    """Refuse a backbone that differs from what its recipe builds in more than sizes."""
    if _difference(dense, model.backbone) is None:
        return
    # Some networks adapt a setting of theirs to the image: Swin of transformers its windows.
    _check_forward(dense, model.config)
    if difference := _difference(dense, model.backbone):
        raise ValueError(
            f"{difference}: loading would build another network than this one. Say it in the recipe instead, by "
            "from_backbone with small_images=True or arguments of the backbone, and make other classes by "
            "hf_mrpf.with_new_head; a network that was changed by hand can be pruned and trained as a plain nn.Module"
        )


def _difference(dense: nn.Module, network: nn.Module) -> str | None:
    """The first module that is not as the recipe builds it, and how."""
    wanted, found = _working(dense), _working(network)
    for name in (*found, *wanted):
        if (name in found) != (name in wanted):
            here, there = ("backbone", "recipe") if name in found else ("recipe", "backbone")
            return f"{_full_name(name)} is in the {here} and not in the {there}"
    for name, module in found.items():
        other: Any = wanted[name]
        if _kind(module) is not _kind(other) and not _is_synchronised(module, other):
            return f"{_full_name(name)} is a {type(module).__name__}, and the recipe builds a {type(other).__name__}"
        for key in sorted(_settings(module) | _settings(other)):
            value, built = (getattr(each, key, _ABSENT) for each in (module, other))
            # What the recipe's module has not got at all was hung there by a library, and is not read by its forward.
            if built is not _ABSENT and _is_plain(built) and not (_is_plain(value) and _same(value, built)):
                return f"{_full_name(name)}.{key} is {reprlib.repr(value)}, and the recipe builds {built!r}"
        if isinstance(module, nn.Conv2d) and module.weight.shape[2:] != other.weight.shape[2:]:
            return (
                f"{_full_name(name)} has kernels of {tuple(module.weight.shape[2:])}, and the recipe builds "
                f"{tuple(other.weight.shape[2:])}"
            )
    return None


def _working(network: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, but for those that do nothing, or do nothing outside of training."""
    idle = (nn.Identity, nn.modules.dropout._DropoutNd)
    return {
        name: module
        for name, module in network.named_modules()
        if not isinstance(module, idle) and type(module).__name__ != "DropPath"
    }


def _kind(module: nn.Module) -> type:
    """The class of a module; FSDP puts one of its own before it."""
    return next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.distributed"))


def _is_synchronised(module: nn.Module, other: nn.Module) -> bool:
    plain = type(other) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    # timm's has an activation of its own, which torch's converter would drop.
    timm = type(module).__name__, type(other).__name__
    return (plain and type(module) is nn.SyncBatchNorm) or timm == ("SyncBatchNormAct", "BatchNormAct2d")


def _settings(module: nn.Module) -> set[str]:
    """Names of the plain values that say what a module computes, other than sizes."""
    names = vars(module).keys() - SIZE_ATTRIBUTES - _WITHOUT_EFFECT
    return {name for name in names if not name.startswith("_") and "drop" not in name and _is_plain(vars(module)[name])}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, tuple | list) and isinstance(other, tuple | list):
        return len(value) == len(other) and all(map(_same, value, other))
    return value == other


def apply_pruning(model: PrunedForImageClassification, record: dict[str, Any]) -> None:
    r"""
    Give a dense model the sizes of a record, in place: every tensor keeps its leading entries.

    Args:
        model ([`PrunedForImageClassification`]):
            A dense model of the recipe the record was made for.
        record (`dict`):
            What [`describe_pruning`] returned.

    Raises:
        ValueError: naming the key, for a record that has unknown tensors, modules or attributes, enlarges anything or
            holds other than positive sizes. The model is then unchanged.
    """
    _apply_record(model.backbone, record)


def with_new_head(
    model: PrunedForImageClassification, id2label: dict[int, str] | list[str]
) -> PrunedForImageClassification:
    r"""
    Give a trained model, dense or pruned, other classes: everything is copied but the layers whose size follows their
    number, which are random.

    Args:
        model ([`PrunedForImageClassification`]):
            The trained model; it is left as it is.
        id2label (`dict[int, str]` or `list[str]`):
            Name of each class; classes are numbered from 0.

    Returns:
        [`PrunedForImageClassification`] of the same device, dtype and mode, pruned as `model` is.

    Raises:
        ValueError: if the number of classes is that of `model`: then it is not known whether the head fits. Also for
            names that are not of classes from 0 on or not different, and as [`describe_pruning`].
    """
    if isinstance(model, nn.Module):
        check_class(model)
    if not isinstance(model, PrunedForImageClassification):
        raise ValueError(f"model is a {type(model).__name__}; a PrunedForImageClassification is needed")
    id2label = _checked_names(id2label)
    if len(id2label) == model.config.num_labels:
        raise ValueError(f"the model has {len(id2label)} classes already: give id2label another number of them")
    config, record = copy.deepcopy(model.config), describe_pruning(model)
    config.id2label = id2label
    config.label2id = {label: index for index, label in config.id2label.items()}
    config.pruning = None
    with torch.device("meta"):
        before, after = (_tensors(_build_backbone(each)) for each in (model.config, config))
    if record is not None:
        for name, shape in record["shapes"].items():
            sizes = zip(before[name].shape, after[name].shape, shape, strict=True)
            record["shapes"][name] = [size if old == new else new for old, new, size in sizes]
        config.pruning = record
    head = {name for name, tensor in after.items() if tensor.shape != before[name].shape}
    other: Any = type(model)(config)
    other.to(device=model.device, dtype=model.dtype)
    # Assigned and not copied into tensors of one dtype: those of the model may differ.
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in head}
    other.load_state_dict(kept, strict=False, assign=True)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters() if name in kept}
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    return other.train(model.training)


def _dtype_of_replica(model: PrunedForImageClassification) -> torch.dtype:
    """What `model.dtype` says of the original."""
    former: Any = [getattr(module, "_former_parameters", {}).values() for module in model.modules()]
    return next((tensor.dtype for tensors in former for tensor in tensors if tensor.is_floating_point()), torch.float32)


def _apply_record(network: nn.Module, record: Any) -> None:
    if not isinstance(record, dict) or record.keys() != {"shapes", "attrs"}:
        raise ValueError(f"pruning must be an object of 'shapes' and 'attrs', got {reprlib.repr(record)}")
    for part, value in record.items():
        if not isinstance(value, dict):
            raise ValueError(f"pruning.{part} must be an object, got {reprlib.repr(value)}")
    tensors, sizes = _tensors(network), _sizes(network)
    for name, shape in record["shapes"].items():
        key = f"pruning.shapes[{name!r}]"
        if name not in tensors:
            raise ValueError(f"{key}: the backbone has no such tensor")
        _check_shrunk(key, shape, list(tensors[name].shape))
    for module, values in record["attrs"].items():
        key = f"pruning.attrs[{module!r}]"
        if module not in sizes:
            raise ValueError(f"{key}: the backbone has no such module with sizes")
        if not isinstance(values, dict):
            raise ValueError(f"{key} must be an object, got {reprlib.repr(values)}")
        for attribute, value in values.items():
            if attribute not in sizes[module]:
                raise ValueError(f"{key}: {attribute!r} is not a size of that module")
            _check_shrunk(f"{key}[{attribute!r}]", value, sizes[module][attribute])
        _check_scale(key, sizes[module], values)

    modules = {_full_name(name): module for name, module in network.named_modules()}
    for name, shape in record["shapes"].items():
        parent, _, leaf = name.rpartition(".")
        tensor = tensors[name].detach()[tuple(slice(size) for size in shape)].clone()
        if isinstance(tensors[name], nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=tensors[name].requires_grad)
        setattr(modules[parent], leaf, tensor)
    for name, values in record["attrs"].items():
        for attribute, value in values.items():
            setattr(modules[name], attribute, tuple(value) if isinstance(value, list) else value)


def _check_shrunk(key: str, value: Any, dense: Any) -> None:
    """Refuse a size that is not a positive integer up to the dense one, or a scale outside [dense, 1]."""
    if isinstance(dense, float):
        # The softmax scale is a power of a head's width, which only shrinks.
        if type(value) is not float or not min(dense, 1.0) <= value <= max(dense, 1.0):
            raise ValueError(f"{key} must be a number in [{dense}, 1], got {reprlib.repr(value)}")
        return
    if isinstance(dense, list) != isinstance(value, list):
        raise ValueError(
            f"{key} must be {'a list' if isinstance(dense, list) else 'an integer'}, got {reprlib.repr(value)}"
        )
    new, old = (value, dense) if isinstance(value, list) else ([value], [dense])
    if len(new) != len(old):
        raise ValueError(f"{key} has {len(new)} dimensions, the dense backbone has {len(old)}: {dense}")
    for size, most in zip(new, old, strict=True):
        if not _is_size(size):
            raise ValueError(f"{key} must hold positive integers, got {reprlib.repr(value)}")
        if size > most:
            raise ValueError(f"{key} is {reprlib.repr(value)}, larger than the dense backbone's {dense}")


def _check_scale(key: str, dense: dict[str, Any], values: dict[str, Any]) -> None:
    """Refuse a softmax scale that does not follow from the heads: fused attention reads it off them, eager does not."""
    after = dense | values
    name = "head_dim" if "head_dim" in dense else "attention_head_size"
    for attribute in {"scale", "scaling"} & dense.keys():
        follows = type(dense.get(name)) is int and math.isclose(dense[attribute], dense[name] ** -0.5, rel_tol=1e-6)
        if follows and not math.isclose(after[attribute], after[name] ** -0.5, rel_tol=1e-6):
            raise ValueError(
                f"{key}[{attribute!r}] is {after[attribute]}, but {name} {after[name]} needs {after[name] ** -0.5}"
            )


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _full_name(name: str) -> str:
    return f"backbone.{name}" if name else "backbone"


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    named = [*network.named_parameters(), *network.named_buffers()]
    return {_full_name(name): tensor for name, tensor in named}


def _sizes(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Every attribute of SIZE_ATTRIBUTES that holds an integer, a float or a sequence of integers, as JSON values."""
    found = {}
    for name, module in network.named_modules():
        values: dict[str, Any] = {}
        for attribute in SIZE_ATTRIBUTES & vars(module).keys():
            value = vars(module)[attribute]
            if type(value) in (int, float):
                values[attribute] = value
            elif isinstance(value, tuple | list) and value and all(type(size) is int for size in value):
                values[attribute] = list(value)
        if values:
            found[_full_name(name)] = values
    return found


def _checked_channels(name: str, values: Any, positive: bool = False) -> list[float]:
    # One number alone, perhaps as a tensor or array, is refused below with the same message.
    several = isinstance(values, Iterable) and not isinstance(values, str) and getattr(values, "ndim", None) != 0
    values = [_number(value) for value in values] if several else [values]
    if len(values) != 3 or not all(type(value) is float and math.isfinite(value) for value in values):
        raise ValueError(f"{name} must be 3 finite numbers, one for each channel, got {reprlib.repr(values)}")
    if positive and min(values) <= 0:
        raise ValueError(f"{name} must be above 0, got {values}")
    return values


def _number(value: Any) -> Any:
    """The float of any real number, also of numpy's or in a tensor without dimensions; anything else as it is."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _checked_names(id2label: Any) -> dict[int, str]:
    """The name of each class by its number, from a list or a dict; keys of JSON are strings."""
    try:
        names = dict(id2label) if isinstance(id2label, dict) else dict(enumerate(id2label))
        names = {int(index): str(name) for index, name in names.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"id2label must be a list or a dict of names, got {reprlib.repr(id2label)}") from error
    if isinstance(id2label, str):
        raise ValueError(f"id2label must be a list or a dict of names, got {id2label!r}")
    _check_numbered(names)
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        # As ImageNet has two kinds of crane.
        _LOGGER.warning("id2label has the name %r more than once: label2id tells only the last of these.", twice[0])
    return dict(sorted(names.items()))


def _check_numbered(names: Any) -> None:
    if sorted(names) != list(range(len(names))):
        numbers = f"{len(names)} classes from 0 to {len(names) - 1}"
        raise ValueError(f"id2label must number its {numbers}, got {reprlib.repr(sorted(names))}")


def _check_number_kept(load: Callable[..., Any], saved: dict[str, Any], options: dict[str, Any]) -> None:
    """Refuse to load a model with another number of classes than it was saved with: its head would not fit."""
    for key in ("num_labels", "id2label"):
        value = options.get(key)
        wanted = len(value) if isinstance(value, dict | list) else value
        if wanted is not None and wanted != (number := load(dict(saved)).num_labels):
            raise ValueError(f"{key} says {wanted} classes, and the saved model has {number}: {_NEW_HEAD}")


def _check_common(values: dict[str, Any]) -> None:
    """Refuse what transformers reads of any config and would fail on, or follow to another file."""
    for key in ("transformers_weights", "quantization_config"):
        if values.get(key) is not None:
            raise ValueError(f"{key} is not for models of this class, got {reprlib.repr(values[key])}")
    labels = values.get("num_labels")
    if labels is not None and not (_is_size(labels) and labels <= _MOST_LABELS):
        raise ValueError(f"num_labels must be a positive integer up to {_MOST_LABELS}, got {reprlib.repr(labels)}")
    for key in ("attn_implementation", "_attn_implementation"):
        if values.get(key) not in (None, "eager", "sdpa"):
            raise ValueError(f"{key} must be 'eager' or 'sdpa', got {reprlib.repr(values[key])}")
    for key in ("dtype", "torch_dtype"):
        value = values.get(key)
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{key} must name a floating point type of torch, got {reprlib.repr(value)}")


def _checked_recipe(recipe: Any) -> dict[str, Any]:
    source = recipe.get("source") if isinstance(recipe, dict) else None
    if not isinstance(source, str) or source not in BACKBONES:
        raise ValueError(
            f"backbone must be an object with 'source' one of {sorted(BACKBONES)}, got {reprlib.repr(recipe)}"
        )
    fields = _RECIPE_FIELDS[source]
    for field, kind in fields.items():
        if not isinstance(recipe.get(field), kind):
            raise ValueError(
                f"backbone[{field!r}] must be of type {kind.__name__}, got {reprlib.repr(recipe.get(field))}"
            )
    if unknown := recipe.keys() - fields.keys() - {"source"}:
        raise ValueError(f"backbone has unknown fields {sorted(map(str, unknown))}; known: {['source', *fields]}")
    try:
        recipe = json.loads(json.dumps(recipe, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the backbone's arguments must be JSON values (a layer by its name, say): {error}") from error
    for field in fields:
        _check_harmless(f"backbone[{field!r}]", recipe[field])
    return recipe


def _check_harmless(key: str, value: Any) -> None:
    """Refuse what no network is described by: numbers that cost memory, and names of files or addresses."""
    if isinstance(value, dict | list):
        for part, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_harmless(f"{key}[{part!r}]", inner)
    elif isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        raise ValueError(f"{key} is {reprlib.repr(value)}, more than any network's {_LARGEST_INTEGER}")
    elif isinstance(value, str) and any(mark in value for mark in "/\\:"):
        raise ValueError(f"{key} is {reprlib.repr(value)}: a backbone has no paths or addresses")


@contextmanager
def _bounded_depth() -> Iterator[None]:
    """Stop the building of a network that has more modules than any real one."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > _MOST_MODULES:
            raise ValueError(f"the network has more than {_MOST_MODULES} modules")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def _recipe_name(config: PrunedConfig) -> str:
    recipe = config.backbone
    return repr(recipe["name"] if recipe["source"] == "timm" else recipe["config"].get("model_type"))


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _build_backbone(config: PrunedConfig, eager: bool = False) -> nn.Module:
    network = BACKBONES[config.backbone["source"]](config, eager)
    if config.small_images:
        _fit_small_images(network, config.image_size)
    return network


def _check_forward(plan: nn.Module, config: PrunedConfig) -> None:
    """Run a meta-device network on one image: sizes that do not fit show, and nothing is computed."""
    size = config.image_size
    plan.eval()
    try:
        with torch.no_grad(), torch.device("meta"):
            shape = _logits(plan(torch.zeros(1, 3, size, size, dtype=torch.get_default_dtype()))).shape
    except Exception as error:  # any network may fail in its own way; all of them mean the same here
        raise ValueError(
            f"{_recipe_name(config)} cannot run at image_size {size}"
            f"{'' if config.pruning is None else ' with this pruning record'}: {error}"
        ) from error
    if shape != (1, config.num_labels):
        raise ValueError(
            f"{_recipe_name(config)} gives logits of shape {tuple(shape)} for one image, but there are "
            f"{config.num_labels} labels"
        )


def _can_checkpoint(network: Any) -> bool:
    if isinstance(network, PreTrainedModel):
        return network.supports_gradient_checkpointing
    if not hasattr(network, "set_grad_checkpointing"):
        return False
    try:
        network.set_grad_checkpointing(True)
    except AssertionError:  # timm's way to say no
        return False
    network.set_grad_checkpointing(False)
    return True


def _keep_statistics(network: nn.Module) -> list[RemovableHandle]:
    """Have BatchNorm and its kin count each batch once, though checkpointed blocks run twice."""
    hooks = []
    for module in network.modules():
        if module._buffers.get("running_var") is not None:
            hooks.append(module.register_forward_pre_hook(_lend_statistics))
            # A recomputation ends by an exception as soon as it has what the backward pass needs.
            hooks.append(module.register_forward_hook(_return_statistics, always_call=True))
    return hooks


def _lend_statistics(module: nn.Module, inputs: Any) -> None:
    # A forward within a backward pass is a recomputation. It updates copies: none at all would be another graph than
    # the first one, and undoing an update in place would make autograd refuse it.
    if module.training and torch._C._current_graph_task_id() != -1:
        own = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
        module.__dict__["_own_statistics"] = own
        module._buffers.update({name: buffer.clone() for name, buffer in own.items()})


def _return_statistics(module: nn.Module, inputs: Any, output: Any) -> None:
    module._buffers.update(module.__dict__.pop("_own_statistics", {}))


@contextmanager
def _connected(source: Any) -> Iterator[None]:
    """The client lets some ends of a connection through as they are, which are no OSError."""
    try:
        yield
    except HTTPError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(f"{source} could not be fetched: the connection to the Hub ended ({error}). Try again") from error


def _check_index(source: Any, options: dict[str, Any]) -> None:
    """Refuse an index of shards that cannot be read, or that names anything but safetensors files beside it."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
    known = {name: options[name] for name in (*names, "_commit_hash") if options.get(name) is not None}
    # Every other failure is left to transformers, which looks for the weights next.
    for kind in ("missing_entries", "connection_errors", "gated_repo"):
        known[f"_raise_exceptions_for_{kind}"] = False
    path = None if source is None else cached_file(source, "model.safetensors.index.json", **known)
    if path is None:
        return
    try:
        index = json.loads(Path(path).read_text(encoding="utf-8"))
        files = set(index["weight_map"].values())
        if not isinstance(index["metadata"], dict):
            raise TypeError("metadata is no object")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: model.safetensors.index.json is no index of weights: {error!r}") from error
    for file in files:
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\\" in file:
            raise ValueError(
                f"{source}: model.safetensors.index.json names {reprlib.repr(file)}, no safetensors file beside it"
            )


def _place(source: Any, key: str) -> str:
    """Where a tensor was read or should have been; without a source transformers takes a `state_dict`."""
    if source is None:
        return "state_dict"
    index = Path(str(source)) / "model.safetensors.index.json"
    sharded = index.is_file()
    file = json.loads(index.read_text())["weight_map"].get(key, index.name) if sharded else "model.safetensors"
    return f"{source}: {file}"


def _damaged_file(source: Any) -> str:
    for path in sorted(Path(str(source)).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return path.name
    return "model.safetensors"


def _check_headers(model: PrunedForImageClassification, files: Iterable[Any]) -> None:
    """Compare names and shapes in the weights' files with the model's, reading no tensor."""
    saved: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            saved |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    info = {
        "missing_keys": expected.keys() - saved.keys(),
        "unexpected_keys": saved.keys() - expected.keys(),
        "mismatched_keys": [
            (key, shape, expected[key]) for key, shape in saved.items() if shape != expected.get(key, shape)
        ],
    }
    _check_keys(info, model.config.name_or_path)


def _check_keys(info: dict[str, Any], source: Any) -> None:
    for problem, keys in (("lacks", info["missing_keys"]), ("has the unknown tensor", info["unexpected_keys"])):
        for key in sorted(keys):
            raise ValueError(f"{_place(source, key)} {problem} {key!r} ({len(keys)} such tensors)")
    for key, saved, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{_place(source, key)} holds {key!r} with shape {tuple(saved)}, but config.json says {tuple(expected)}"
        )


def _check_loaded(model: PrunedForImageClassification, info: dict[str, Any], source: Any) -> None:
    _check_keys(info, source)
    _check_values(model, lambda key: f"{_place(source, key)} holds")


def _check_values(model: PrunedForImageClassification, holds: Callable[[str], str]) -> None:
    for key, tensor in model.state_dict().items():
        # All processes would have to look at a tensor that is shared out among them.
        if hasattr(tensor, "to_local") or tensor.is_meta:
            continue
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ValueError(f"{holds(key)} NaN in {key!r}")
    for name in ("image_mean", "image_std"):
        buffer = getattr(model, name)
        wanted = getattr(model.config, name)
        if not buffer.is_meta and not torch.equal(buffer.cpu(), torch.tensor(wanted, dtype=buffer.dtype)):
            raise ValueError(f"{holds(name)} {name} {buffer.tolist()}, config.json {wanted}")


def _check_can_load(model: PrunedForImageClassification) -> None:
    """Refuse to save what loading would refuse."""
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        network = _build_backbone(config)
    if config.pruning is not None:
        _apply_record(network, config.pruning)
    _check_forward(network, config)
    _check_values(model, lambda key: "the model holds")


def _align(model: nn.Module) -> None:
    """Move weights to where an allocator would have put them: in a file they lie at any multiple of 4 bytes, kernels
    choose their order of additions by the address, and logits would differ in the last bit from the saved model's."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("this backbone comes from timm: pip install timm") from error
    return timm


def _timm_name(backbone: str) -> str | None:
    """The timm name in `backbone`, with its tag if it has one; None for what must be a transformers id or folder."""
    timm = _timm()
    name = backbone.removeprefix("timm/")
    architecture, _, tag = name.partition(".")
    if timm.is_model(architecture):
        if tag and not timm.models.is_model_pretrained(name):
            known = timm.list_pretrained(f"{architecture}.*")
            raise ValueError(f"timm has no weights {name!r}; known: {', '.join(known) or 'none'}")
        return name
    if "/" in name or name == "" or Path(backbone).is_dir():
        return None
    close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
    raise ValueError(
        f"timm has no model {architecture!r}; close names: {', '.join(close) or 'none (see timm.list_models())'}"
    )


def _create_timm(name: str, num_labels: int, kwargs: dict[str, Any], weights: str | None = None) -> nn.Module:
    """Build a timm network; `weights` is a safetensors file that must hold every tensor of it."""
    timm = _timm()
    if not timm.is_model(name.partition(".")[0]) or ("." in name and weights is None):
        raise ValueError(f"backbone['name'] must be a timm architecture, got {name!r}")
    if refused := sorted(_REFUSED_TIMM_KWARGS & kwargs.keys()):
        raise ValueError(f"backbone['kwargs'] may not hold {', '.join(refused)}")
    loading: dict[str, Any] = {"pretrained": False}
    if weights is not None:
        # Not timm's own download, which falls back to a pickle. custom_load is for other formats than state dicts.
        overlay = {"file": weights, "custom_load": False, "num_classes": num_labels}
        loading = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        return timm.create_model(name, num_classes=num_labels, **loading, **kwargs)
    except (*_BUILD_ERRORS, SafetensorError) as error:
        source = "" if weights is None else f" and the weights in {weights}"
        raise ValueError(f"timm cannot build {name!r} with {kwargs}{source}: {error}") from error


def _timm_backbone(config: PrunedConfig, eager: bool) -> nn.Module:
    name, kwargs = config.backbone["name"], config.backbone["kwargs"]
    if config.small_images and name.startswith("vgg"):
        # Small images drop VGG's 102 million head weights: do not draw them first.
        kwargs = {**kwargs, "mlp_ratio": 1 / 4096}
    network = _create_timm(name, config.num_labels or 0, kwargs)
    modules: list[Any] = [module for module in network.modules() if hasattr(module, "fused_attn")]
    for module in modules:
        module.fused_attn = module.fused_attn and not eager
    return network


def _from_timm_name(
    name: str, labels: int | None, size: int | None, kwargs: dict[str, Any], revision: str | None, *, pretrained: bool
) -> dict[str, Any]:
    if not pretrained and "." not in name:
        return _from_timm(name, labels, size, kwargs)
    start = _timm().get_pretrained_cfg(name)
    if not start.hf_hub_id:
        raise ValueError(
            f"timm has weights of {name!r} as a pickle only ({start.url or 'no address'}), which is not read; "
            f"{name.partition('.')[0]!r} without pretrained weights can be trained"
        )
    source, _, pinned = start.hf_hub_id.partition("@")
    return _from_timm(name, labels, size, kwargs, source, revision or pinned or None)


def _from_timm(
    name: str,
    labels: int | None,
    size: int | None,
    kwargs: dict[str, Any],
    source: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """`source` is the Hub repository or the folder of the weights, None for random ones."""
    architecture = name.partition(".")[0]
    start = _timm().get_pretrained_cfg(name)
    own = {key: getattr(start, key) for key in ("input_size", "mean", "std", "num_classes")}
    weights = None
    if source is not None:
        weights, config = _fetched(name, source, revision)
        if config.get("architecture") == architecture:
            # timm's registry may know another version of these weights, or none.
            settings = {**config["pretrained_cfg"], **config}
            own |= {key: settings[key] for key in own if key in settings}
            kwargs = {key: value for key, value in config["model_args"].items() if key != "num_classes"} | kwargs
        if not isinstance(own["input_size"], list | tuple) or not own["input_size"]:
            raise ValueError(f"{source}: config.json: input_size is {own['input_size']!r}, not channels, height, width")
        if not (own["num_classes"] == 0 or _is_size(own["num_classes"])) or own["num_classes"] > _MOST_LABELS:
            raise ValueError(f"{source}: config.json: num_classes is {own['num_classes']!r}, no number of classes")
    recipe = _checked_recipe({"source": "timm", "name": architecture, "kwargs": kwargs})
    with torch.device("meta"), _bounded_depth():
        probe = _create_timm(architecture, 1, kwargs)
    # Some classes hand **kwargs to a parent that takes img_size.
    inits = [vars(kind)["__init__"] for kind in type(probe).__mro__ if "__init__" in vars(kind)]
    takes_size = any("img_size" in inspect.signature(init).parameters for init in inits)
    if size is None:
        size = kwargs.get("img_size") or own["input_size"][-1]
    elif takes_size:
        kwargs = {**kwargs, "img_size": size}
    recipe["kwargs"] = kwargs
    found: dict[str, Any] = {"backbone": recipe, "image_size": size, "num_labels": labels or own["num_classes"]}
    if weights is None:
        return found
    found |= {"image_mean": own["mean"], "image_std": own["std"]}
    PrunedConfig(**found)  # refuses what the repository's config.json may hold, before memory is spent
    if (count := sum(tensor.numel() for tensor in probe.parameters())) > Path(weights).stat().st_size:
        raise ValueError(
            f"{source}: model.safetensors is too small for the {count} parameters of {architecture!r} with {kwargs}"
        )
    network = _create_timm(name, own["num_classes"], kwargs, weights)
    if found["num_labels"] != own["num_classes"]:
        trained, network = network, _create_timm(architecture, found["num_labels"], kwargs)
        _copy_all_but_head(network, trained, found["num_labels"], own["num_classes"])
    return {**found, "network": network}


def _fetched(name: str, source: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Path of the weights in a repository or folder of timm's, and the content of the `config.json` beside them."""
    try:
        with _connected(source):
            weights = cached_file(source, "model.safetensors", revision=revision)
            quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
            config = cached_file(source, "config.json", revision=revision, **quiet)
    except OSError as error:
        raise OSError(
            f"The weights of {name!r} could not be fetched: {error} Of {source}, model.safetensors is read and never a "
            "pickle."
        ) from error
    try:
        content = json.loads(Path(config).read_text(encoding="utf-8")) if config else {}
    except ValueError as error:
        raise ValueError(f"{source}: config.json cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source}: config.json must hold an object, got {reprlib.repr(content)}")
    content = {"pretrained_cfg": {}, **content, "model_args": content.get("model_args") or {}}
    for key in ("pretrained_cfg", "model_args"):
        if not isinstance(content[key], dict):
            raise ValueError(f"{source}: config.json: {key} must be an object, got {reprlib.repr(content[key])}")
    return str(weights), content


def _copy_all_but_head(network: nn.Module, trained: nn.Module, labels: int, before: int) -> None:
    """Copy the weights of the same backbone with `before` classes (0 for none): the head stays as it is."""
    own, weights = network.state_dict(), trained.state_dict()
    differing = own.keys() ^ weights.keys() if before else weights.keys() - own.keys()
    if differing:
        raise ValueError(f"the weights and these arguments differ in tensors: {', '.join(sorted(differing)[:5])}")
    for name in own.keys() & weights.keys():
        new, old = tuple(own[name].shape), tuple(weights[name].shape)
        if new == old:
            own[name] = weights[name]
        elif new[1:] != old[1:] or (new[0], old[0]) != (labels, before):
            raise ValueError(f"the weights of {name} have shape {old}, this image_size and these arguments need {new}")
    network.load_state_dict(own)


def _transformers_backbone(config: PrunedConfig, eager: bool) -> nn.Module:
    values = {key: value for key, value in config.backbone["config"].items() if key not in _DROPPED_CONFIG_KEYS}
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str) or model_type in _REFUSED_MODEL_TYPES:
        raise ValueError(f"backbone['config'] must name a transformers model_type, got {model_type!r}")
    try:
        inner = AutoConfig.for_model(model_type, **values, num_labels=config.num_labels)
        inner._attn_implementation = "eager" if eager else None
        kinds: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(inner)]
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        return next((kind for kind in kinds if kind.__name__ in (inner.architectures or ())), kinds[0])(inner)
    except _BUILD_ERRORS as error:
        raise ValueError(f"transformers cannot build {model_type!r} for image classification: {error}") from error


def _from_transformers_config(
    config: PreTrainedConfig, labels: int | None, size: int | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    if config.model_type in _REFUSED_MODEL_TYPES:
        raise ValueError(
            f"backbone is of type {config.model_type!r}: load a saved model of this class with from_pretrained (for "
            f"other classes than its own, {_NEW_HEAD}), and a timm model by its name, 'timm/<architecture>.<tag>'"
        )
    values = {key: value for key, value in config.to_diff_dict().items() if key not in _DROPPED_CONFIG_KEYS}
    if unknown := [key for key in kwargs if not hasattr(config, key)]:
        raise ValueError(f"{type(config).__name__} has no {', '.join(unknown)}; it has {', '.join(sorted(values))}")
    values |= kwargs
    if size is not None and hasattr(config, "image_size"):
        values["image_size"] = size
    found = {
        "backbone": {"source": "transformers", "config": values},
        "image_size": size or values.get("image_size", 224),
        "num_labels": labels or config.num_labels,
    }
    if found["num_labels"] == config.num_labels:
        found |= {"id2label": config.id2label, "label2id": config.label2id}
    return found


def _from_transformers_model(
    model: PreTrainedModel, labels: int | None, size: int | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    found = _from_transformers_config(model.config, labels, size, kwargs)
    found["backbone"]["config"]["architectures"] = [type(model).__name__]
    network: Any = _transformers_backbone(PrunedConfig(**found), eager=False)
    if type(network) is not type(model):
        raise ValueError(
            f"backbone must be an image classification model, got {type(model).__name__}: pass {type(network).__name__}"
        )
    _copy_all_but_head(network, model, found["num_labels"], model.config.num_labels or 0)
    return {**found, "network": nn.Module.to(network, device=model.device, dtype=model.dtype)}


def _from_hub(
    name: str, labels: int | None, size: int | None, kwargs: dict[str, Any], revision: str | None, normalised: bool
) -> dict[str, Any]:
    """From a repository or folder in the format of transformers or of timm; `normalised`: mean and std are given."""
    # No recipe could hold code of the repository's own; None would ask on the terminal whether to run it.
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    values, _ = PrunedConfig.get_config_dict(name, revision=revision)
    if "pretrained_cfg" in values:
        if not _timm().is_model(architecture := str(values.get("architecture"))):
            raise ValueError(f"{name}: config.json: timm has no architecture {architecture!r}")
        return _from_timm(architecture, labels, size, kwargs, name, revision)
    try:
        _check_common(values)
        config = AutoConfig.from_pretrained(name, **options)
    except StrictDataclassError as error:
        raise ValueError(f"{name}: config.json: {error}") from error
    _from_transformers_config(config, labels, size, kwargs)
    try:
        with _connected(name):
            # Before transformers, which has somebody else's service convert a repository's pickle.
            files = ("model.safetensors", "model.safetensors.index.json")
            quiet = {"_raise_exceptions_for_missing_entries": False}
            if not any(cached_file(name, file, revision=revision, **quiet) for file in files):
                raise OSError(f"{name} holds no model.safetensors. A pickle, such as pytorch_model.bin, is not read")
            model, info = AutoModelForImageClassification.from_pretrained(
                name, config=config, use_safetensors=True, output_loading_info=True, **options
            )
            processor = _own_processor(name, normalised, options)
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{name}: {_damaged_file(name)} does not hold the weights of config.json: {error}") from error
    # A repository without a head is a start too; anything else would silently be random.
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if lost := sorted(key for key in info["missing_keys"] if shapes.get(key, ())[:1] != (config.num_labels,)):
        raise ValueError(f"{_place(name, lost[0])} lacks {lost[0]!r} ({len(lost)} such tensors)")
    found = _from_transformers_model(model, labels, size, kwargs)
    if processor is None:
        return found
    try:
        found |= _normalisation(processor)
    except ValueError as error:
        raise ValueError(
            f"{name}: preprocessor_config.json: {error}. Correct it in a copy of the repository, and give its folder"
        ) from error
    if getattr(processor, "do_flip_channel_order", False):
        # These weights were trained on BGR images; this class takes RGB.
        first = next(module for module in found["network"].modules() if isinstance(module, nn.Conv2d))
        first.weight.data = first.weight.data.flip(1)
    return found


def _own_processor(name: str, normalised: bool, options: dict[str, Any]) -> Any:
    """The image processor beside the weights; None where there is none, and none is needed."""
    try:
        return AutoImageProcessor.from_pretrained(name, **options)
    except OSError as error:
        quiet = {"_raise_exceptions_for_missing_entries": False, "revision": options["revision"]}
        if any(cached_file(name, file, **quiet) for file in ("preprocessor_config.json", "processor_config.json")):
            raise
        if normalised:
            return None
        raise OSError(
            f"{name}: there is no preprocessor_config.json that says which normalisation its weights were trained "
            f"with. Save the image processor beside them, or give image_mean and image_std. {error}"
        ) from error


def _normalisation(processor: Any) -> dict[str, list[float]]:
    """`image_mean` and `image_std` that make of pixels in [0, 1] what the processor makes of pixels in [0, 255]."""
    mean, std, factor = [0.0] * 3, [1.0] * 3, 1
    if processor.do_rescale:
        factor = processor.rescale_factor
        if type(factor) not in (int, float) or not math.isfinite(factor) or factor <= 0:
            raise ValueError(f"rescale_factor must be a finite number above 0, got {reprlib.repr(factor)}")
    own = processor.do_normalize, getattr(processor, "include_top", False)
    if any(own):
        given = _checked_channels("image_std", processor.image_std, positive=True)
        if processor.do_normalize:
            mean = _checked_channels("image_mean", processor.image_mean)
        # EfficientNet's top was trained on what is divided once more.
        std = [each ** sum(map(bool, own)) for each in given]
    # Processors of other models are told of an offset by their configuration, and do not know it.
    if processor.do_rescale and hasattr(type(processor), "rescale_offset") and processor.rescale_offset:
        mean = [each + 1 for each in mean]
    scale = 255 * factor
    return {"image_mean": [each / scale for each in mean], "image_std": [each / scale for each in std]}


def _small_conv(like: nn.Module, width: int) -> nn.Conv2d:
    weight = next(like.parameters())
    conv = nn.Conv2d(3, width, 3, padding=1, bias=False, device=weight.device, dtype=weight.dtype)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _small_timm_resnet(network: Any, size: int) -> None:
    network.conv1 = _small_conv(network, network.bn1.num_features)
    network.maxpool = nn.Identity()


def _small_timm_vgg(network: Any, size: int) -> None:
    network.pre_logits = nn.Identity()
    old, width = network.head.fc, network.num_features
    network.head.fc = nn.Linear(width, old.out_features, device=old.weight.device, dtype=old.weight.dtype)
    nn.init.normal_(network.head.fc.weight, 0, 0.01)
    nn.init.zeros_(network.head.fc.bias)
    network.head_hidden_size = network.head.in_features = network.head.num_features = width


def _small_transformers_resnet(network: Any, size: int) -> None:
    embedder = network.resnet.embedder
    embedder.embedder.convolution = _small_conv(network, embedder.embedder.normalization.num_features)
    embedder.pooler = nn.Identity()


def _small_mobilevit(network: Any, size: int) -> None:
    # Five layers halve the map. The earliest give way until 4x4 pixels are left for the last attention.
    halving = [module for module in network.modules() if isinstance(module, nn.Conv2d) and module.stride == (2, 2)]
    while len(halving) > 3 and size < 4 * 2 ** len(halving):
        halving.pop(0).stride = (1, 1)


def _small_timm_byob(network: Any, size: int) -> None:
    kinds = {f"{type(module).__module__}.{type(module).__qualname__}" for module in network.modules()}
    if not kinds & {"timm.models.mobilevit.MobileVitBlock", "timm.models.mobilevit.MobileVitV2Block"}:
        raise ValueError("small_images: of timm's ByobNet networks only MobileViT and MobileViTV2 have a form")
    _small_mobilevit(network, size)


def _fit_small_images(network: nn.Module, size: int) -> None:
    name = f"{type(network).__module__}.{type(network).__qualname__}"
    if name not in SMALL_IMAGE_FORMS:
        raise ValueError(
            f"small_images: no form for small images is known for {name}; known: {', '.join(SMALL_IMAGE_FORMS)}. "
            "A ViT or a Swin needs none: give it image_size with patch_size and, for Swin, window_size"
        )
    SMALL_IMAGE_FORMS[name](network, size)


# By exact class: a namesake or a subclass may have another stem.
SMALL_IMAGE_FORMS: dict[str, Callable[[Any, int], None]] = {
    "timm.models.resnet.ResNet": _small_timm_resnet,
    "timm.models.vgg.VGG": _small_timm_vgg,
    "timm.models.byobnet.ByobNet": _small_timm_byob,
    "transformers.models.resnet.modeling_resnet.ResNetForImageClassification": _small_transformers_resnet,
    "transformers.models.mobilevit.modeling_mobilevit.MobileViTForImageClassification": _small_mobilevit,
    "transformers.models.mobilevitv2.modeling_mobilevitv2.MobileViTV2ForImageClassification": _small_mobilevit,
}
BACKBONES: dict[str, Callable[[PrunedConfig, bool], nn.Module]] = {
    "timm": _timm_backbone,
    "transformers": _transformers_backbone,
}


def _push_with_card(self: PrunedForImageClassification, repo_id: str, **options: Any) -> Any:
    """Send the model to the Hub with a short card, see `hf_mrpf.hub.push_model`; a copy pushes as transformers does."""
    return import_module(".hub", __package__).push_model(self, repo_id, **options)


PrunedConfig.register_for_auto_class()
PrunedForImageClassification.register_for_auto_class("AutoModelForImageClassification")
if not __name__.startswith("transformers_modules."):
    # A copy that came with a checkpoint must not take the place of the installed class.
    AutoConfig.register(PrunedConfig.model_type, PrunedConfig, exist_ok=True)
    AutoModelForImageClassification.register(PrunedConfig, PrunedForImageClassification, exist_ok=True)
    PrunedForImageClassification.push_to_hub = _push_with_card  # type: ignore[method-assign,assignment]
