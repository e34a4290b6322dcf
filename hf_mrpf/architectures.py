"""What is known about classes of layers: which pruning understands, which it must refuse, which sizes they keep.

Classes are matched by their exact identity, never by bare name or as a subclass: a subclass may standardise its weights
over the channels that pruning removes, and namesakes compute something else.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

# Layers with weights: (module, qualified name) -> what pruning does with it.
LAYERS: dict[tuple[str, str], str] = {
    ("torch.nn.modules.conv", "Conv2d"): "conv",
    ("timm.layers.conv2d_same", "Conv2dSame"): "conv",
    ("torch.nn.modules.linear", "Linear"): "linear",
    ("timm.layers.linear", "Linear"): "linear",
    ("torch.nn.modules.batchnorm", "BatchNorm1d"): "norm",
    ("torch.nn.modules.batchnorm", "BatchNorm2d"): "norm",
    ("torch.nn.modules.batchnorm", "SyncBatchNorm"): "norm",
    ("timm.layers.norm_act", "BatchNormAct2d"): "norm",
    ("torch.nn.modules.normalization", "LayerNorm"): "norm",
    ("torch.nn.modules.normalization", "GroupNorm"): "norm",
    ("timm.layers.norm", "LayerNorm"): "norm",
    ("timm.layers.norm", "LayerNorm2d"): "norm",
    ("timm.layers.norm", "GroupNorm1"): "norm",
    ("transformers.models.convnext.modeling_convnext", "ConvNextLayerNorm"): "norm",
}


@dataclass(frozen=True)
class AttentionKind:
    """
    Where a class of attention keeps its projections. Heads lie one after the other, `head_dim` rows each.

    Attributes:
        q, k, v (`str`):
            Names of the submodules that make queries, keys and values: three layers, or the same name three times for
            one layer whose rows are all queries, then all keys, then all values.
        out (`str`):
            Name of the submodule that reads the heads' outputs, in the order of the values' rows.
        heads (`str`, *optional*):
            Name of the attribute that holds the number of heads, followed to submodules (`"attention.num_heads"`).
            None for the linear attention of MobileViTV2: one query row, keys multiplied with values channel by channel.
        per_head (`tuple[tuple[str, int], ...]`):
            Further parameters that have one entry for each head, with the axis of the heads.
    """

    q: str
    k: str
    v: str
    out: str
    heads: str | None
    per_head: tuple[tuple[str, int], ...] = ()


_FUSED = AttentionKind("qkv", "qkv", "qkv", "proj", "num_heads")
_SPLIT = AttentionKind("q_proj", "k_proj", "v_proj", "o_proj", "num_attention_heads")
_TRANSFORMERS = "transformers.models"
ATTENTIONS: dict[tuple[str, str], AttentionKind] = {
    ("timm.layers.attention", "Attention"): _FUSED,
    ("timm.models.vision_transformer", "Attention"): _FUSED,  # timm before 1.0.21
    ("timm.models.swin_transformer", "WindowAttention"): replace(
        _FUSED, per_head=(("relative_position_bias_table", 1),)
    ),
    ("timm.models.mobilevit", "LinearSelfAttention"): AttentionKind(
        "qkv_proj", "qkv_proj", "qkv_proj", "out_proj", None
    ),
    (f"{_TRANSFORMERS}.vit.modeling_vit", "ViTAttention"): _SPLIT,
    (f"{_TRANSFORMERS}.deit.modeling_deit", "DeiTAttention"): _SPLIT,
    (f"{_TRANSFORMERS}.swin.modeling_swin", "SwinAttention"): replace(
        _SPLIT, per_head=(("relative_position_bias.relative_position_bias_table", 1),)
    ),
    (f"{_TRANSFORMERS}.mobilevit.modeling_mobilevit", "MobileViTAttention"): AttentionKind(
        "attention.query", "attention.key", "attention.value", "output.dense", "attention.num_attention_heads"
    ),
    (f"{_TRANSFORMERS}.mobilevitv2.modeling_mobilevitv2", "MobileViTV2LinearSelfAttention"): AttentionKind(
        "qkv_proj.convolution", "qkv_proj.convolution", "qkv_proj.convolution", "out_proj.convolution", None
    ),
}
# Four neighbouring pixels' channels, one block after the other, into a norm and a layer: (norm, layer).
MERGES: dict[tuple[str, str], tuple[str, str]] = {
    ("timm.models.swin_transformer", "PatchMerging"): ("norm", "reduction"),
    (f"{_TRANSFORMERS}.swin.modeling_swin", "SwinPatchMerging"): ("norm", "reduction"),
}

# Where a network keeps the layer whose inputs are its features, if that is not the classifier.
_FEATURES_READ_BY: dict[tuple[str, str], str] = {
    ("timm.models.vgg", "VGG"): "pre_logits.fc1",
    ("timm.models.mobilenetv3", "MobileNetV3"): "conv_head",
    ("timm.models.repghost", "RepGhostNet"): "conv_head",
    ("timm.models.lcnetv2", "LCNetV2"): "conv_head",
    ("timm.models.hgnet", "HighPerfGpuNet"): "head.last_conv.0",
    ("timm.models.byobnet", "ByobNet"): "head.pre_logits.fc",
}

_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
# Modules with parameters of their own that are layers, whatever they are called: not for `ATTENTIONS` or the trace.
_LAYER_BASES = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def register_attention(
    kind: type[nn.Module],
    *,
    q: str,
    k: str,
    v: str,
    out: str,
    heads: str | None = "num_heads",
    per_head: Mapping[str, int] | None = None,
) -> None:
    """
    Teach pruning a class of attention, by its exact identity (subclasses are not meant).

    The class must compute `softmax(q k^T * head_dim ** -0.5 + anything) v` for each head, take its input as the first
    argument with channels last, and read its sizes from the tensors or from attributes called `head_dim`,
    `attention_head_size`, `attn_dim`, `all_head_size`, `scale` or `scaling`, which are set after pruning.

    Args:
        kind (`type[nn.Module]`):
            The class.
        q, k, v (`str`):
            Names of the `Linear` submodules that make queries, keys and values; the same name three times for one
            layer whose rows are all queries, then all keys, then all values. Heads lie one after the other.
        out (`str`):
            Name of the `Linear` submodule that reads the heads' outputs.
        heads (`str`, *optional*, defaults to `"num_heads"`):
            Name of the attribute with the number of heads, such as `"attention.num_heads"`. None for linear attention
            as in MobileViTV2.
        per_head (`Mapping[str, int]`, *optional*):
            Names of further parameters with one entry for each head, and the axis of the heads.

    Raises:
        ValueError: If `kind` is no class of modules, or the class is known with other settings.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"kind is {kind!r}; a class of modules is needed.")
    if len({q, k, v}) == 2:
        raise ValueError(f"q, k and v are {q!r}, {k!r} and {v!r}; three layers are needed, or one for all.")
    entry = AttentionKind(q, k, v, out, heads, tuple((per_head or {}).items()))
    identity = (kind.__module__, kind.__qualname__)
    if ATTENTIONS.get(identity, entry) != entry:
        raise ValueError(f"{'.'.join(identity)} is known already, with other settings: {ATTENTIONS[identity]}.")
    ATTENTIONS[identity] = entry


def class_id(module: nn.Module) -> tuple[str, str]:
    """Identity of a module's class: where it is defined and its qualified name."""
    return type(module).__module__, type(module).__qualname__


def full_name(module: nn.Module) -> str:
    """Full class name for messages: `"timm.layers.attention.Attention"`."""
    return ".".join(class_id(module))


def known_layers(model: nn.Module) -> dict[str, str]:
    """
    Name the layers with weights, and refuse a model that has any that pruning does not understand.

    Args:
        model (`nn.Module`):
            Model whose layers must be of classes in `LAYERS`, and its attention of classes in `ATTENTIONS`. Other
            modules may hold parameters of their own (position embeddings, scales): the trace follows those.

    Returns:
        `dict[str, str]`: by `named_modules` name, in module order: `"conv"`, `"depthwise"`, `"grouped"`, `"linear"` or
        `"norm"`.

    Raises:
        ValueError: If the model holds attention of an unknown class, or a layer of another class. The message gives the
            full class name.
    """
    _refuse_shared(model)
    inside = tuple(f"{name}." for name in known_attention(model))
    layers: dict[str, str] = {}
    for name, module in model.named_modules():
        own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
        kind = LAYERS.get(class_id(module))
        plain = isinstance(module, nn.ParameterList | nn.ParameterDict)
        layer = isinstance(module, _LAYER_BASES) or type(module).__module__.startswith("torch.nn.modules.")
        layer = layer and not plain
        if own and kind is None and layer and not name.startswith(inside):
            raise unsupported(name, module, f"holds parameters ({', '.join(own)}) that pruning does not understand")
        if kind is None:
            continue
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            kind = "depthwise" if module.groups == module.in_channels == module.out_channels else "grouped"
        if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
            raise unsupported(name, module, f"normalises {module.num_groups} groups of channels apart")
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            raise unsupported(name, module, f"normalises over several dimensions {tuple(module.normalized_shape)}")
        layers[name] = kind
    return layers


def _refuse_shared(model: nn.Module) -> None:
    """A tensor in two modules would be cut in each of them, and be two tensors afterwards."""
    owners: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter in owners:
                shared = f"shares its parameter {key!r} with {owners[parameter]!r}"
                raise unsupported(name, module, f"{shared}: give each a copy of its own")
            owners[parameter] = f"{name}.{key}".lstrip(".")


def known_attention(model: nn.Module) -> dict[str, AttentionKind]:
    """Attention modules by `named_modules` name; a ValueError names the first of a class that is not known."""
    found: dict[str, AttentionKind] = {}
    for name, module in model.named_modules():
        if name.startswith(tuple(f"{attention}." for attention in found)):
            continue
        kind = ATTENTIONS.get(class_id(module))
        if kind is not None:
            found[name] = kind
        # A block that merely contains attention also says so by name: the innermost module is the one to report.
        elif [child for child in module.modules() if _is_attention(child)] == [module]:
            raise unsupported(name, module, "is attention of a class that is not known (see register_attention)")
    return found


def channel_axis(layer: nn.Module) -> int:
    """Axis of the channels in what a known layer reads and gives."""
    if isinstance(layer, nn.LayerNorm):
        first = class_id(layer)[1] == "LayerNorm2d" or getattr(layer, "data_format", "") == "channels_first"
        return 1 if first else -1
    return -1 if isinstance(layer, nn.Linear) else 1


def _is_attention(module: nn.Module) -> bool:
    named = class_id(module) in ATTENTIONS or _ATTENTION.search(type(module).__qualname__)
    return bool(named) and next(module.parameters(), None) is not None


def unsupported(name: str, module: nn.Module, reason: str) -> ValueError:
    """The error that refuses `module`, found under `name`."""
    where = f"module {name!r}" if name else "the model itself"
    known = ", ".join(sorted({qualified for _, qualified in LAYERS}))
    return ValueError(
        f"cannot prune this model: {where} ({full_name(module)}) {reason}. It is refused rather than pruned wrongly. "
        f"Supported are networks of {known} layers and known attention, with operations between them that keep every "
        "channel apart: choose such a backbone (ResNet, MobileNet, ConvNeXt, ViT, Swin, MobileViT), or teach "
        "hf_mrpf/architectures.py the class."
    )


def owner(model: nn.Module, names: Iterable[str]) -> tuple[str, nn.Module]:
    """Name and module of the innermost code that holds all of these layers (or parameters): what runs between them."""
    paths = [name.split(".")[:-1] for name in names]
    path = paths[0]
    while any(other[: len(path)] != path for other in paths):
        path = path[:-1]
    while isinstance(model.get_submodule(".".join(path)), nn.ModuleList | nn.ModuleDict):
        path = path[:-1]
    return ".".join(path), model.get_submodule(".".join(path))


def refresh(model: nn.Module) -> nn.Module:
    """
    Set the size attributes that networks keep beside their layers from the layers' shapes.

    After pruning, the sizes and softmax scales of attention modules and of Swin's patch merging are those of the
    smaller network, and so are `num_features`, `head_hidden_size`, `embed_dim` and a head's `in_features` of timm
    networks, so that `reset_classifier` builds a head that fits. Other networks are left as they are.

    Args:
        model (`nn.Module`):
            A pruned model, or one that holds a pruned timm network. Changed in place.

    Returns:
        `nn.Module`: `model`.
    """
    for module in model.modules():
        if class_id(module) in ATTENTIONS:
            _refresh_attention(module, ATTENTIONS[class_id(module)])
        elif class_id(module) in MERGES:
            outs, ins = _shape(module, MERGES[class_id(module)][1])
            _set(module, dim=ins // 4, out_dim=outs)
        elif callable(getattr(module, "get_classifier", None)):
            _refresh_features(module)
    return model


def _refresh_attention(module: nn.Module, kind: AttentionKind) -> None:
    _, inner = _shape(module, kind.out)
    if kind.heads is None:
        _set(module, embed_dim=inner)
        return
    path, _, attribute = kind.heads.rpartition(".")
    dim = inner // getattr(module.get_submodule(path), attribute)
    for child in module.modules():
        _set(child, head_dim=dim, attention_head_size=dim, attn_dim=inner, all_head_size=inner)
        _set(child, scale=dim**-0.5, scaling=dim**-0.5)
    _set(module, dim=_shape(module, kind.q)[1])


def _shape(module: nn.Module, path: str) -> tuple[int, int]:
    """Outputs and inputs of a layer inside a module."""
    weight = cast(nn.Linear, module.get_submodule(path)).weight
    return weight.shape[0], weight.shape[1]


def _refresh_features(network: nn.Module) -> None:
    classifiers = network.get_classifier()  # type: ignore[operator]
    # A distilled network has two, of the same width.
    classifier = classifiers[0] if isinstance(classifiers, tuple) else classifiers
    if not isinstance(getattr(network, "num_features", None), int) or not isinstance(classifier, nn.Linear | nn.Conv2d):
        return
    width = classifier.weight.shape[1]
    known = dict(network.named_modules()).get(_FEATURES_READ_BY.get(class_id(network), ""))
    reader = known if isinstance(known, nn.Linear | nn.Conv2d) else classifier
    features = _unpooled(network, reader)
    stem = getattr(getattr(network, "patch_embed", None), "proj", None)
    embed = stem.out_channels if isinstance(stem, nn.Conv2d) else width
    _set(network, num_features=features, head_hidden_size=width, embed_dim=embed)
    for head in [each for each in network.modules() if getattr(each, "fc", None) is classifier and each is not network]:
        first = reader if reader in head.modules() else classifier
        _set(head, in_features=_unpooled(head, first), num_features=width)


def _unpooled(module: nn.Module, reader: nn.Linear | nn.Conv2d) -> int:
    """Channels of what a layer reads, before a pooling ahead of it that gives both their means and their maxima."""
    times = 1
    for ahead in module.modules():
        if ahead is reader:
            break
        if callable(multiple := getattr(ahead, "feat_mult", None)):
            times = multiple()
    return reader.weight.shape[1] // times


def _set(module: nn.Module, **sizes: int | float) -> None:
    """Set those attributes that the module has as plain numbers. A count that would grow counts something else."""
    for name, size in sizes.items():
        now: Any = vars(module).get(name)
        if type(now) in (int, float) and (isinstance(size, float) or size <= now):
            setattr(module, name, size)
