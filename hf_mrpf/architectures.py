"""What is known about classes of layers: which pruning understands, which it must refuse, which sizes they keep.

Classes are matched by their exact identity, never by bare name or as a subclass: a subclass may standardise its weights
over the channels that pruning removes, and namesakes compute something else.
"""

import re
from collections.abc import Callable

from torch import nn

# Every parameter of a model must belong to one of these: (module, qualified name) -> what pruning does with it.
LAYERS: dict[tuple[str, str], str] = {
    ("torch.nn.modules.conv", "Conv2d"): "conv",
    ("timm.layers.conv2d_same", "Conv2dSame"): "conv",
    ("torch.nn.modules.linear", "Linear"): "linear",
    ("timm.layers.linear", "Linear"): "linear",
    ("torch.nn.modules.batchnorm", "BatchNorm1d"): "norm",
    ("torch.nn.modules.batchnorm", "BatchNorm2d"): "norm",
    ("torch.nn.modules.batchnorm", "SyncBatchNorm"): "norm",
    ("timm.layers.norm_act", "BatchNormAct2d"): "norm",
}

# Where a network keeps the layer whose inputs are its features, if that is not the classifier.
_FEATURES_READ_BY: dict[tuple[str, str], str] = {
    ("timm.models.vgg", "VGG"): "pre_logits.fc1",
    ("timm.models.mobilenetv3", "MobileNetV3"): "conv_head",
}

_ATTENTION = re.compile("attention|attn", re.IGNORECASE)


def class_id(module: nn.Module) -> tuple[str, str]:
    """Identity of a module's class: where it is defined and its qualified name."""
    return type(module).__module__, type(module).__qualname__


def full_name(module: nn.Module) -> str:
    """Full class name for messages: `"timm.layers.attention.Attention"`."""
    return ".".join(class_id(module))


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a convolution keeps its channels apart, so that inputs and outputs are the same channels."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def known_layers(model: nn.Module) -> dict[str, str]:
    """
    Name the layers that hold parameters, and refuse a model that has any that pruning does not understand.

    Args:
        model (`nn.Module`):
            Model whose every parameter must belong to a class in `LAYERS`.

    Returns:
        `dict[str, str]`: by `named_modules` name, in module order: `"conv"`, `"depthwise"`, `"linear"` or `"norm"`.

    Raises:
        ValueError: If the model holds an attention module, a grouped convolution, or parameters of another class. The
            message gives the full class name.
    """
    for name, module in model.named_modules():
        # A block that merely contains attention also says so by name: the innermost module is the one to report.
        named = [child for child in module.modules() if _is_attention(child)]
        if named == [module]:
            raise unsupported(name, module, "is attention, whose heads cannot be cut like channels")
    layers: dict[str, str] = {}
    for name, module in model.named_modules():
        own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
        kind = LAYERS.get(class_id(module))
        if own and kind is None:
            raise unsupported(name, module, f"holds parameters ({', '.join(own)}) that pruning does not understand")
        if kind is None:
            continue
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            if not is_depthwise(module):
                raise unsupported(name, module, f"is a convolution of {module.groups} groups that is not depthwise")
            kind = "depthwise"
        layers[name] = kind
    return layers


def _is_attention(module: nn.Module) -> bool:
    return bool(_ATTENTION.search(type(module).__qualname__)) and next(module.parameters(), None) is not None


def unsupported(name: str, module: nn.Module, reason: str) -> ValueError:
    """The error that refuses `module`, found under `name`."""
    where = f"module {name!r}" if name else "the model itself"
    known = ", ".join(sorted({qualified for _, qualified in LAYERS}))
    return ValueError(
        f"cannot prune this model: {where} ({full_name(module)}) {reason}. It is refused rather than pruned wrongly. "
        f"Supported are networks of {known} layers with channel-wise operations between them: choose such a backbone "
        "(ResNet, VGG, MobileNet), or teach hf_mrpf/architectures.py the class."
    )


def refresh(model: nn.Module) -> nn.Module:
    """
    Set the size attributes that timm networks keep beside their layers from the layers' shapes.

    After pruning, `num_features`, `head_hidden_size` and a head's `in_features` are those of the smaller network, so
    that `reset_classifier` builds a head that fits. Other networks are left as they are.

    Args:
        model (`nn.Module`):
            A pruned model, or one that holds a pruned timm network. Changed in place.

    Returns:
        `nn.Module`: `model`.
    """
    for module in model.modules():
        get_classifier: Callable[[], nn.Module] | None = getattr(module, "get_classifier", None)
        if get_classifier is None or not isinstance(getattr(module, "num_features", None), int):
            continue
        classifier = get_classifier()
        if not isinstance(classifier, nn.Linear):
            continue
        width = classifier.in_features
        reader = dict(module.named_modules()).get(_FEATURES_READ_BY.get(class_id(module), ""))
        features = reader.in_channels if isinstance(reader, nn.Conv2d) else width
        for attribute, size in (("num_features", features), ("head_hidden_size", width)):
            if hasattr(module, attribute):
                setattr(module, attribute, size)
        for head in module.modules():
            if getattr(head, "fc", None) is classifier and head is not module:
                for attribute in ("in_features", "num_features"):
                    if isinstance(getattr(head, attribute, None), int):
                        setattr(head, attribute, width)
    return model
