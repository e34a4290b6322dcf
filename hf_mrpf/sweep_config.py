"""The file of a sweep: what it holds, what `--small` and `--set` change in it; what is not known is refused."""

import copy
import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .recipe_options import RECIPES, option_names

# The axes of a grid and the option that a bare value of each stands for; a method is nothing but its options.
AXES = {
    "architecture": "model_name_or_path",
    "data": "dataset_name",
    "objective": "objective",
    "optim": "optim",
    "seed": "seed",
    "method": None,
    "importance": "importance",
    "allocation": "allocation",
    "target": "target",
}
# What a dense model depends on: cells that agree in these start from the same one.
DENSE_AXES = ("architecture", "data", "objective", "optim", "seed")
CONTROLS = ("dense_longer", "from_scratch")
SECTIONS = ("name", "output_dir", "common", "dense", "prune", "grid", "controls", "show", "small")
# Settled for each run by the sweep itself.
TAKEN = (
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub"),
    *("fresh_weights", "dense_epochs", "report_split"),
)
Options = dict[str, Any]


@dataclass(frozen=True)
class SweepConfig:
    """
    A sweep as its file says it.

    Attributes:
        name (`str`): of the figure or table; the stem of the file if not given.
        output_dir (`str`): folder of the runs, the table and what is drawn; `outputs/sweeps` if not given. Sweeps in
            one folder share the runs that they have in common, such as dense models.
        common, dense, prune (`dict`): options of every run, of the training of dense models alone, and of pruning with
            its fine-tuning. The control `dense_longer` is trained by those of the fine-tuning, `from_scratch` by those
            of dense models.
        grid (`dict[str, dict[Any, dict]]`): options of each value of each axis.
        controls (`dict`): `dense_longer` (`bool`), and `from_scratch`: `True` for every cell, or the values of axes
            that a cell must have.
        show (`dict`): what is drawn of the table.
        always (`dict`): options that `--set` puts over all others.
    """

    name: str
    output_dir: str
    common: Options = field(default_factory=dict)
    dense: Options = field(default_factory=dict)
    prune: Options = field(default_factory=dict)
    grid: dict[str, dict[Any, Options]] = field(default_factory=dict)
    controls: dict[str, Any] = field(default_factory=dict)
    show: dict[str, Any] = field(default_factory=dict)
    always: Options = field(default_factory=dict)


def read_config(path: Path | str, *, small: bool = False, overrides: Sequence[str] = ()) -> SweepConfig:
    """
    Reads the YAML file of a sweep.

    Args:
        path (`Path` or `str`): the file; its keys are those of [`SweepConfig`], and `small`.
        small (`bool`, *optional*, defaults to `False`): put in the changes that the file has under `small`; the name
            then ends in `-small`.
        overrides (`Sequence[str]`, *optional*): `KEY=VALUE` each, the value as YAML. A key is a path into the file
            (`grid.seed=[0]`, `show.against=...`), or an option of a recipe that no value of the grid sets, which is
            then put over all others.

    Raises:
        ValueError: where the file cannot be read, or has a key that is not known, with those that are.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; the sweeps of the paper are in recipes/configs.")
    content = _yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping with some of the keys {', '.join(SECTIONS)}.")
    _refuse_unknown(str(path), content, SECTIONS)
    changes = dict(_mapping("small", content.pop("small", None)))
    name = content.setdefault("name", path.stem)
    if small:
        if not changes:
            raise ValueError(f"{path} has no section `small`, so there is nothing for --small; use --set.")
        content["name"] = f"{name}-small"
    content.setdefault("output_dir", "outputs/sweeps")
    content["grid"] = {axis: _values(axis, values) for axis, values in _mapping("grid", content.get("grid")).items()}
    wanted = list(changes.items()) if small else []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override}: write KEY=VALUE, such as --set max_train_samples=200.")
        wanted.append((key.strip(), _yaml(text, f"--set {override}")))
    always: Options = {}
    for key, value in wanted:
        if key.split(".")[0] == "small":
            raise ValueError(f"--set {key}: `small` is a set of such changes itself; set what it changes.")
        if key.split(".")[0] in SECTIONS:
            _put(content, key, value)
        else:
            _refuse_unknown("an option of a run", [key], _known(*RECIPES))
            always[key] = value
    return _checked(content, always)


def _checked(content: dict[str, Any], always: Options) -> SweepConfig:
    for section, recipes in {"common": RECIPES, "dense": ["train"], "prune": ["prune"]}.items():
        content[section] = _options(section, content.get(section), recipes)
    always = _options("--set", always, RECIPES)
    for axis, values in content["grid"].items():
        for label, options in values.items():
            known = list(RECIPES) if axis in DENSE_AXES else ["prune"]
            values[label] = _options(f"grid.{axis}.{label}", options, known)
            for option in always.keys() & values[label].keys():
                place = f"grid.{axis}=[...]" if option == AXES[axis] else f"grid.{axis}.{label}.{option}=..."
                raise ValueError(
                    f"--set {option}: {label!r} of the axis {axis} sets it, and would stand for something else in the "
                    f'figure. Change the grid instead: --set "{place}".'
                )
    _refuse_two_values(content["grid"])
    if not content["name"] or not isinstance(content["name"], str) or Path(content["name"]).name != content["name"]:
        raise ValueError(
            f"name is {content['name']!r}; figures and tables are files of that name in output_dir, so a text without "
            "folders is needed, such as my-sweep."
        )
    if not content["output_dir"] or not isinstance(content["output_dir"], str):
        raise ValueError(f"output_dir is {content['output_dir']!r}; the path of a folder is needed.")
    if not content["grid"]:
        raise ValueError(f"grid is empty; give at least one axis: {', '.join(AXES)}.")
    content["controls"] = _controls(dict(_mapping("controls", content.get("controls"))), content["grid"])
    content["show"] = dict(_mapping("show", content.get("show")))
    return SweepConfig(**content, always=always)


def _refuse_two_values(grid: Mapping[str, Mapping[Any, Options]]) -> None:
    """Of two axes that set one option the later would win, and what is drawn would tell of the other's value."""
    for (axis, values), (other, further) in itertools.combinations(grid.items(), 2):
        for (label, options), (beside, others) in itertools.product(values.items(), further.items()):
            for option in options.keys() & others.keys():
                if options[option] != others[option]:
                    raise ValueError(
                        f"grid: {label!r} of the axis {axis} sets {option} to {options[option]!r}, and {beside!r} of "
                        f"the axis {other}, which it meets, to {others[option]!r}. Let one of the two axes set it."
                    )


def _values(axis: str, values: Any) -> dict[Any, Options]:
    """Options by value: of a list each value is that of the axis's own option, of a mapping it is named."""
    _refuse_unknown("grid", [axis], AXES)
    if isinstance(values, Mapping):
        named = {label: _bare(axis, label) if options is None else options for label, options in values.items()}
    elif isinstance(values, list):
        named = {value: _bare(axis, value) for value in values if not isinstance(value, list | dict)}
        if len(named) != len(values):
            raise ValueError(f"grid.{axis}: {values} must be single values, each of them once.")
    else:
        raise ValueError(f"grid.{axis}: {values!r} must be a list of values, or a mapping from names to options.")
    if not named:
        raise ValueError(f"grid.{axis} has no value; give one, or leave the axis out.")
    return {label: dict(_mapping(f"grid.{axis}.{label}", options)) for label, options in named.items()}


def _bare(axis: str, value: Any) -> Options:
    option = AXES[axis]
    if option is None:
        raise ValueError(f"grid.{axis}.{value} needs options, such as {{importance: lamp, allocation: global}}.")
    return {option: value}


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    """Puts a value at a dotted path; a list over named values of an axis picks some of them."""
    *folders, last = key.split(".")
    place = content
    for folder in folders:
        # A path is text, and a value may be a number.
        folder = next((known for known in place if str(known) == folder), folder)
        place = place.setdefault(folder, {})
        if not isinstance(place, dict):
            raise ValueError(f"{key}: {folder} is no mapping, so nothing can be set in it.")
    if folders == ["grid"]:
        _refuse_unknown("grid", [last], AXES)
        value = _picked(last, value, place.get(last, {}))
    elif key == "grid":
        value = {axis: _values(axis, values) for axis, values in _mapping(key, value).items()}
    place[last] = value


def _picked(axis: str, value: Any, there: Mapping[Any, Options]) -> dict[Any, Options]:
    single = [item for item in value if not isinstance(item, list | dict)] if isinstance(value, list) else []
    named = [item for item in single if item in there]
    if single and len(named) == len(value):
        return {item: there[item] for item in named}
    if own := [item for item in named if there[item] != {AXES[axis]: item}]:
        other = next(item for item in value if item not in named)
        raise ValueError(
            f"grid.{axis}: {own[0]!r} stands for options of the file, and {other!r} is none of its names, which are "
            f"{', '.join(map(str, there))}. Pick names alone, or give this one options too: "
            f'--set "grid.{axis}.NAME={{...}}".'
        )
    return _values(axis, value)


def _options(place: str, options: Any, recipes: Iterable[str]) -> Options:
    options = dict(_mapping(place, options))
    if taken := [name for name in options if name in TAKEN]:
        raise ValueError(f"{place}: {', '.join(taken)} is settled by the sweep; leave it out.")
    _refuse_unknown(place, options, _known(*recipes))
    return options


def _controls(controls: dict[str, Any], grid: Mapping[str, Mapping]) -> dict[str, Any]:
    _refuse_unknown("controls", controls, CONTROLS)
    if not isinstance(controls.get("dense_longer", False), bool):
        raise ValueError(f"controls.dense_longer: {controls['dense_longer']!r} must be true or false.")
    where = controls.get("from_scratch", False)
    if isinstance(where, bool):
        return controls
    for axis, labels in _mapping("controls.from_scratch", where).items():
        _refuse_unknown("controls.from_scratch", [axis], grid)
        if not isinstance(labels, list):
            raise ValueError(f"controls.from_scratch.{axis}: {labels!r} must be a list of values of that axis.")
        if not [label for label in labels if label in list(grid[axis])]:
            known = ", ".join(map(str, grid[axis]))
            raise ValueError(f"controls.from_scratch.{axis}: none of {labels} is in the grid, which has {known}.")
    return controls


def _known(*recipes: str) -> list[str]:
    return sorted({name for recipe in recipes for name in option_names(recipe) if name not in TAKEN})


def _mapping(place: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}: {value!r} must be a mapping.")
    return copy.deepcopy(value)


def _refuse_unknown(place: str, given: Iterable[Any], known: Iterable[str]) -> None:
    known = list(known)
    for name in given:
        if name in known:
            continue
        near = difflib.get_close_matches(str(name), known, n=5) if len(known) > 20 else known
        hint = f"known: {', '.join(near)}" if near else "see --help of recipes/prune.py and recipes/train.py"
        raise ValueError(f"{place}: {name!r} is not known; {hint}.")


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error
