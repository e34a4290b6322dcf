"""What a sweep shows of its table: a figure or a table, in files beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .allocation import reads
from .config import MRPFConfig
from .sweep import Cell
from .sweep_config import Options, SweepConfig
from .sweep_figures import KINDS, NO_SENSITIVITIES, further_axes
from .sweep_summary import summary_table
from .sweep_table import Row

# What each kind is told beside it: names of axes, but for `against`, which picks values of some.
ARGUMENTS = {"lines": "lines", "dots": "dots", "layers": "lines", "table": "against"}


def check_show(config: SweepConfig, cells: Sequence[Cell]) -> None:
    """
    Refuses a section `show` that could not be drawn, before anything is run for it.

    Args:
        config ([`SweepConfig`]): says what is shown.
        cells (`Sequence[Cell]`): all of the sweep.

    Raises:
        ValueError: with what is known, or is in the grid.
    """
    show = config.show
    kind = show.get("kind")
    if not isinstance(kind, str) or kind not in ARGUMENTS:
        raise ValueError(f"show.kind is {kind!r}; known: {', '.join(ARGUMENTS)}.")
    argument = ARGUMENTS[kind]
    if unknown := sorted(set(show) - {"kind", argument}):
        raise ValueError(f"show: {', '.join(unknown)} is not known for a {kind}; known: kind, {argument}.")
    value: Any = show.get(argument)
    if value is None and kind == "table":
        return
    wanted: tuple[type, ...] = (dict,) if kind == "table" else (str, list)
    if not isinstance(value, wanted):
        form = "a mapping from axes to one value each" if kind == "table" else "an axis, or a list of axes"
        raise ValueError(f"show.{argument} is {value!r}; {form} of the grid is needed: {', '.join(config.grid)}.")
    if not value or not all(isinstance(axis, str) for axis in _axes(value)):
        raise ValueError(f"show.{argument} is {value!r}; names of axes are needed: {', '.join(config.grid)}.")
    for axis in _axes(value):
        if kind == "table" and axis == "data":
            raise ValueError("show.against: accuracies on other data cannot be subtracted; choose another axis.")
        if axis not in config.grid:
            raise ValueError(f"show.{argument}: {axis!r} is no axis of the grid, which has {', '.join(config.grid)}.")
        if kind == "table" and (label := show[argument][axis]) not in list(config.grid[axis]):
            known = ", ".join(map(str, config.grid[axis]))
            raise ValueError(f"show.against.{axis}: {label!r} is not in the grid, which has {known}.")
    pruned = [cell for cell in cells if cell.kind == "pruned"]
    if kind == "dots":
        further_axes([cell.axes for cell in pruned], _axes(value)[0])
    if kind == "layers" and not any(_measures_layers(cell.options) for cell in pruned):
        raise ValueError(f"show.kind is layers. {NO_SENSITIVITIES}")


def _measures_layers(options: Options) -> bool:
    return "sensitivities" in reads(options.get("allocation", MRPFConfig.allocation)) and (
        options.get("combine") != "joint"
    )


def show_rows(config: SweepConfig, rows: Sequence[Row]) -> tuple[list[Path], str]:
    """
    Draws or prints the rows of a sweep.

    Args:
        config ([`SweepConfig`]): says what, and where to.
        rows (`Sequence[Row]`): finished rows of its cells.

    Returns:
        `tuple[list[Path], str]`: files that were written, and the text to print, empty for a figure.

    Raises:
        ValueError: where no cell has finished that could be shown.
    """
    folder, kind = Path(config.output_dir), config.show["kind"]
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "table":
        text = summary_table(rows, against=config.show.get("against"))
        file = folder / f"{config.name}.md"
        file.write_text(f"{text}\n", encoding="utf-8")
        return [file], text
    axes = _axes(config.show[ARGUMENTS[kind]])
    figure = KINDS[kind](rows, axes[0] if kind == "dots" else axes)
    files = [folder / f"{config.name}.{ending}" for ending in ("png", "pdf")]
    for file in files:
        figure.savefig(file, dpi=200)
    return files, ""


def _axes(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
