"""What each field of a pruning plan looks like in JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any

from .units import PruningUnit

_LARGEST_IMAGE = 8192


def _is_image(shape: Sequence[int]) -> bool:
    return min(shape) > 0 and max(shape) <= _LARGEST_IMAGE


def is_int(value: Any) -> bool:
    """Whether a value read from JSON is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _mapping_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(isinstance(k, str) and fits(v) for k, v in value.items())


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(fits(entry) for entry in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_unit(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) == {field.name for field in fields(PruningUnit)}
        and _is_text(value["name"])
        and value["kind"] in ("channels", "attention", "heads")
        and is_int(value["width"])
        and value["width"] > 0
        and _list_of(_is_text)(value["members"])
        and is_int(value["cost"])
    )


def _is_latency(value: Any) -> bool:
    if value is None:
        return True
    needed = {
        "fraction": _is_number,
        "quartiles": lambda pair: _list_of(_is_number)(pair) and len(pair) == 2,
        "milliseconds": _mapping_of(_is_number),
        "rounds": is_int,
        "batch_size": is_int,
        "device": _is_text,
    }
    return isinstance(value, Mapping) and all(fits(value.get(key)) for key, fits in needed.items())


_TEXT = ("a string", _is_text)
_NUMBER = ("a number", _is_number)
_INTEGER = ("an integer", is_int)
_NUMBERS = ("an object of numbers", _mapping_of(_is_number))
_INTEGERS = ("an object of integers", _mapping_of(is_int))
# By field of a plan: what it must be, for a message, and whether a value is that.
FIELD_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "target": _NUMBER,
    "target_metric": _TEXT,
    "allocation": _TEXT,
    "combine": _TEXT,
    "importance": _TEXT,
    "max_ratio": _NUMBER,
    "min_channels": _INTEGER,
    "round_to": _INTEGER,
    "ignore": ("a list of strings", _list_of(_is_text)),
    "seed": _INTEGER,
    "units": ("a list of units (name, kind, width, members, cost)", _list_of(_is_unit)),
    "scores": _NUMBERS,
    "module_scores": _NUMBERS,
    "ratios": _NUMBERS,
    "kept": (
        "an object of lists of integers (of heads, qk and v for attention)",
        _mapping_of(
            lambda kept: (
                _list_of(is_int)(kept)
                or (
                    isinstance(kept, Mapping)
                    and _list_of(is_int)(kept.get("heads"))
                    and all(_list_of(_list_of(is_int))(kept.get(part)) for part in ("qk", "v"))
                )
            )
        ),
    ),
    "before": _INTEGERS,
    "after": _INTEGERS,
    "achieved": _NUMBERS,
    "example_shape": (
        f"[1, channels, height, width], up to {_LARGEST_IMAGE} pixels",
        lambda shape: _list_of(is_int)(shape) and len(shape) == 4 and shape[0] == 1 and _is_image(shape[1:]),
    ),
    "sensitivity": ("an object or null", lambda value: value is None or isinstance(value, Mapping)),
    "versions": ("an object of strings", _mapping_of(_is_text)),
    "weights_sha256": _TEXT,
    "dense_size": ("an object of integers or null", lambda value: value is None or _INTEGERS[1](value)),
    "latency": ("an object of fraction, quartiles, milliseconds, rounds, batch_size and device, or null", _is_latency),
}
