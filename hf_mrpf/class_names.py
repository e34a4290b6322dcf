"""Names of classes, by which a model and a data set are known to number them alike."""

from collections.abc import Sequence
from typing import Any

from torch import nn


def model_class_names(model: nn.Module) -> list[str] | None:
    """The names that the config of a model has for its classes, in their order; None where it has none of its own."""
    return config_class_names(getattr(model, "config", None))


def config_class_names(config: Any) -> list[str] | None:
    """The same, of the config itself."""
    named: Any = getattr(config, "id2label", None) or {}
    # JSON has strings for keys.
    names = [str(name) for _, name in sorted(named.items(), key=lambda item: int(item[0]))]
    return None if names == [f"LABEL_{index}" for index in range(len(names))] else names


def check_class_names(known: Sequence[str] | None, names: Sequence[str] | None, advice: str) -> None:
    """
    Refuse a data set that numbers the classes otherwise than a model.

    Args:
        known (`Sequence[str]`, *optional*):
            Names of the model's classes.
        names (`Sequence[str]`, *optional*):
            Names of the data set's, which may be the first ones of the model's alone. Capitals, underscores and spaces
            make no difference, and names that are missing or mere numbers tell nothing.
        advice (`str`):
            What to do.

    Raises:
        ValueError: with the first class that has another name, or the number of classes where the data set has more.
    """
    if not known or not names or _are_numbers(known) or _are_numbers(names):
        return
    for index, (name, own) in enumerate(zip(known, names, strict=False)):
        if _plain(name) != _plain(own):
            raise ValueError(f"class {index} is {name!r} for the model and {own!r} in the data set: {advice}")
    if len(names) > len(known):
        raise ValueError(f"the data set has {len(names)} classes, and the model the first {len(known)}: {advice}")


def _are_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(index) for index in range(len(names))]


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())
