"""The cells of a sweep: which runs of which recipes a grid stands for, in which order, and their commands."""

import contextlib
import hashlib
import io
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cli import changes_result
from .objectives import dense_objective
from .recipe_options import option_names, parse_recipe
from .sweep_config import DENSE_AXES, Options, SweepConfig

# Kinds of cells, and what comes first: a cell starts from the result of one of an earlier rank.
RANKS = {"dense": 0, "pruned": 1, "dense-longer": 1, "from-scratch": 2}
RECIPE_OF = {"dense": "train", "pruned": "prune", "dense-longer": "train", "from-scratch": "train"}
TITLES = {"dense-longer": "dense, same extra epochs", "from-scratch": "shape from scratch, equal compute"}
# What a cell that starts from a saved model has from it.
OF_THE_MODEL = ("model_name_or_path", "model_revision", "backbone_kwargs", "pretrained", "small_images", "image_size")
# What an image costs in training, how many an epoch has, and what the result is measured on: controls of equal compute
# have these in common with the dense training and with the fine-tuning.
EQUAL = (
    *("dataset_name", "dataset_config_name", "dataset_revision", "train_split", "test_split", "max_train_samples"),
    *("max_eval_samples", "objective", "num_steps", "awp_gamma", "norm", "eps"),
)
LONGEST_NAME = 100
# Stands for a model that has not been trained yet, where options are only tried.
SOME_MODEL = "timm/resnet18"


@dataclass(frozen=True)
class Cell:
    """
    One run of a sweep.

    Attributes:
        kind (`str`): `"dense"`; `"pruned"`, which is also fine-tuned; or a control, `"dense-longer"` or
            `"from-scratch"`.
        axes (`dict`): value of each axis of the grid that the run depends on.
        options (`dict`): of the recipe, but for the folders.
        start (`Cell`, *optional*): the cell whose result it starts from.
        others (`list[dict]`): further places in the grid that the run stands at, such as the dense model of the
            objectives `trades` and `rslad`.
    """

    kind: str
    axes: dict[str, Any]
    options: Options
    start: "Cell | None" = field(default=None, repr=False)
    others: list[dict[str, Any]] = field(default_factory=list, compare=False, repr=False)

    @property
    def recipe(self) -> str:
        """`"prune"` or `"train"`."""
        return RECIPE_OF[self.kind]

    @property
    def settings(self) -> str:
        """A hash of all that its result depends on."""
        options = {key: value for key, value in self.options.items() if changes_result(key)}
        content = [self.kind, options, self.start and self.start.settings]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """Name of its folder and its lines in the table: its axes to be read, its settings as a hash."""
        words = "-".join([self.kind, *map(str, self.axes.values())])
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', words)[:LONGEST_NAME].strip('-')}-{self.settings}"

    def arguments(self, output_dir: Path | str) -> list[str]:
        """The command line of its recipe."""
        start = {"model_name_or_path": str(run_folder(output_dir, self.start))} if self.start else {}
        return _as_arguments({"output_dir": str(run_folder(output_dir, self)), **start, **self.options})


def run_folder(output_dir: Path | str, cell: Cell) -> Path:
    """Where a cell's run lies."""
    return Path(output_dir) / "runs" / cell.name


def sweep_cells(config: SweepConfig) -> list[Cell]:
    """
    The cells of a sweep, in an order in which each comes after the one that it starts from.

    Dense models come first, then pruned ones and the control that trains the dense one for as long as they are
    fine-tuned, then pruned shapes from scratch.

    Raises:
        ValueError: where two cells would be the same run, or a control cannot be made, with what to change.
    """
    found: dict[str, Cell] = {}
    axes = [axis for axis in (*DENSE_AXES, *config.grid) if axis in config.grid]
    axes = list(dict.fromkeys(axes))
    for labels in itertools.product(*(config.grid[axis] for axis in axes)):
        values = dict(zip(axes, labels, strict=True))
        chosen = _merged(config.grid[axis][label] for axis, label in values.items())
        dense = _once(_dense(config, values), found)
        options = _known(config.common | config.prune | chosen | config.always, "prune")
        pruned = Cell("pruned", values, _less(options, OF_THE_MODEL), dense)
        if (same := _once(pruned, found)) is not pruned:
            raise ValueError(
                f"Two cells of the grid are the same run: {same.axes} and {values}. Each value of an axis must change "
                "an option: leave one of them out, or give it options of its own."
            )
        for control in _controls(config, dense, pruned, chosen):
            _once(control, found)
    return sorted(found.values(), key=lambda cell: RANKS[cell.kind])


def _once(cell: Cell, found: dict[str, Cell]) -> Cell:
    """The first cell that is the same run, which then stands at the place of this one too."""
    first = found.setdefault(cell.settings, cell)
    if cell.axes not in (first.axes, *first.others):
        first.others.append(cell.axes)
    return first


def _dense(config: SweepConfig, values: Mapping[str, Any]) -> Cell:
    axes = {axis: label for axis, label in values.items() if axis in DENSE_AXES}
    chosen = _merged(config.grid[axis][label] for axis, label in axes.items())
    return Cell("dense", axes, _trained(config.common | config.dense | chosen | config.always))


def _controls(config: SweepConfig, dense: Cell, pruned: Cell, chosen: Options) -> Iterator[Cell]:
    where = config.controls.get("from_scratch", False)
    scratch = where is True or (where and all(pruned.axes[axis] in labels for axis, labels in where.items()))
    longer = config.controls.get("dense_longer", False)
    if not (scratch or longer):
        return
    rounds = pruned.options.get("pruning_rounds")
    if isinstance(rounds, int) and rounds > 1:  # what is no number is refused by the recipe's parser
        raise ValueError(
            "controls: with pruning_rounds above 1 the epochs between rounds would have to be told apart; leave out "
            "the controls, or pruning_rounds."
        )

    def trained_as(options: Options) -> Options:
        whole = config.common | config.prune | options | config.always
        return _less(_trained(whole), OF_THE_MODEL) | {"report_split": "test"}

    same = trained_as(chosen)
    if longer:
        # One for each dense model: what only pruned ones are trained by is not in it.
        axes = {axis: label for axis, label in pruned.axes.items() if axis in DENSE_AXES}
        control = trained_as(_merged(config.grid[axis][label] for axis, label in axes.items()))
        if any(same.get(name) != control.get(name) for name in ("num_train_epochs", "max_steps")):
            raise ValueError(
                f"controls.dense_longer trains the dense model for as long as the pruned ones, and {pruned.axes} has a "
                "length of its own: set num_train_epochs and max_steps outside of the grid, or leave the control out."
            )
        yield Cell("dense-longer", axes, control, dense)
    if scratch:
        trained, tuned = _parsed(dense)[-1], Cell("from-scratch", pruned.axes, same, pruned)
        if trained.max_steps > 0 or _parsed(tuned)[-1].max_steps > 0:
            raise ValueError(
                "controls.from_scratch trains at equal compute, which is counted in epochs: give num_train_epochs "
                "instead of max_steps, or leave the control out."
            )
        _refuse_other_costs(dense, tuned)
        # Fresh weights learn by what networks from scratch are trained by here, not by a rate for fine-tuning.
        length = {name: same[name] for name in ("num_train_epochs",) if name in same}
        own = _less(dense.options, (*OF_THE_MODEL, "num_train_epochs")) | length | {"report_split": "test"}
        own |= {"fresh_weights": True, "dense_epochs": trained.num_train_epochs}
        yield Cell("from-scratch", pruned.axes, own, pruned)


def _refuse_other_costs(dense: Cell, tuned: Cell) -> None:
    first, second = ({k: v for part in _parsed(cell) for k, v in vars(part).items()} for cell in (dense, tuned))
    if other := [name for name in EQUAL if first[name] != second[name]]:
        told = ", ".join(f"{name} ({first[name]} and {second[name]})" for name in other)
        raise ValueError(
            f"controls.from_scratch is of equal compute only where dense training and fine-tuning have images and "
            f"attacks alike, and at {tuned.axes} they differ in {told}. Set these in common, or leave the control out."
        )


def check_cells(cells: Iterable[Cell]) -> None:
    """
    Has the recipes' own parsers read the options of every cell, before any is run.

    Raises:
        ValueError: what a recipe would say, and of which cell.
    """
    for cell in cells:
        try:
            _parsed(cell)
        except ValueError as error:
            raise ValueError(f"{cell.kind} {cell.axes}: {error}") from error


def _parsed(cell: Cell) -> tuple:
    start = {"model_name_or_path": SOME_MODEL} if cell.start else {}
    arguments, told = _as_arguments({"output_dir": "outputs", **start, **cell.options}), io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return parse_recipe(cell.recipe, arguments)
    except SystemExit as stop:  # argparse's way of refusing a value
        lines = told.getvalue().strip().splitlines()
        raise ValueError(lines[-1].partition("error: ")[2] if lines else "refused by the recipe") from stop


def command(cell: Cell, output_dir: Path | str, recipes: Path, launcher: Sequence[str] = ()) -> list[str]:
    """The command that does a cell, or goes on with it; `launcher` are options of `accelerate launch`."""
    module = "accelerate.commands.launch"  # by this interpreter, whose `accelerate` need not be on the path
    recipe = str(recipes / f"{cell.recipe}.py")
    return [sys.executable, "-m", module, *launcher, recipe, *cell.arguments(output_dir)]


def shown(words: Sequence[str]) -> str:
    """A command as one would type it."""
    return f"accelerate launch {shlex.join(words[3:])}"


def _trained(options: Options) -> Options:
    options = _known(options, "train")
    if "objective" in options:
        options["objective"] = dense_objective(options["objective"])
    return options


def _known(options: Options, recipe: str) -> Options:
    return {name: value for name, value in options.items() if name in option_names(recipe)}


def _less(options: Options, names: Iterable[str]) -> Options:
    return {name: value for name, value in options.items() if name not in names}


def _merged(parts: Iterable[Options]) -> Options:
    whole: Options = {}
    for part in parts:
        whole |= part
    return whole


def _as_arguments(options: Options) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        if isinstance(value, bool):
            value = str(value).lower()
        if isinstance(value, dict):
            value = json.dumps(value)
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words
