"""The results table: accuracies with their intervals and costs, one row a model, for a terminal or a page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from .report import RobustnessReport

METRIC_TITLES = {"macs": "MACs", "params": "parameters", "latency": "latency"}
LOSS_TITLES = {"ce": "cross-entropy", "dlr": "difference of logits ratio"}
ATTACK_TITLES = {
    **{"fgsm": "FGSM", "pgd20": "PGD-20", "pgd50x5": "PGD-50 x5", "cw": "CW-PGD", "autoattack": "AutoAttack"},
    **{"apgd_ce": "APGD-CE", "apgd_t": "APGD-T", "fab_t": "FAB-T", "square": "Square"},
}


@dataclass(frozen=True)
class ResultRow:
    """
    One line of the results table: a model's accuracies and costs.

    Args:
        name (`str`):
            What stage the model is: `"dense"`, `"pruned"`, `"fine-tuned"`.
        accuracies (`dict[str, float]`), intervals (`dict[str, tuple[float, float]]`):
            Accuracy and its Wilson 95 % interval, for `"clean"` and each attack.
        num_samples (`int`), norm (`str`), eps (`float`), seed (`int`), settings (`dict[str, dict]`):
            How they were measured, as in [`RobustnessReport`].
        parameters (`int`), macs (`int`), file_size (`int`), latency (`dict[str, float]`):
            Parameters; multiply-accumulates of one image; bytes of the weights on disk; median milliseconds of a
            forward pass by batch size (`{"1": 0.8, "64": 21.5}`). What is None or empty stays blank in the table.
    """

    name: str
    accuracies: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    num_samples: int
    norm: str
    eps: float
    seed: int
    settings: dict[str, dict[str, Any]]
    parameters: int | None = None
    macs: int | None = None
    file_size: int | None = None
    latency: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Make a row of its JSON content, as `dataclasses.asdict` gives it."""
        return cls(
            **{**content, "intervals": {name: (low, high) for name, (low, high) in content["intervals"].items()}}
        )

    @classmethod
    def from_report(cls, name: str, report: RobustnessReport, **costs: Any) -> Self:
        """Take the figures of a report; `costs` are `parameters`, `macs`, `file_size` and `latency`."""
        return cls(
            name=name,
            accuracies={key: report.accuracy(key) for key in report},
            intervals=report.intervals,
            num_samples=report.num_samples,
            norm=report.norm,
            eps=report.eps,
            seed=report.seed,
            settings=report.settings,
            **costs,
        )


def results_table(rows: Sequence[ResultRow | Mapping[str, Any]]) -> str:
    """
    The results as plain text for a terminal: the card's table without intervals, and how they were measured.

    Args:
        rows (`Sequence[ResultRow]`):
            At least one, or their JSON content. Costs show their share of the first row's in brackets.

    Raises:
        `ValueError`: no rows, or rows that were measured in different ways.
    """
    known = [row if isinstance(row, ResultRow) else ResultRow.from_dict(row) for row in rows]
    cells = table_cells(known, intervals=False)  # they would make lines that no terminal is wide enough for
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    rule = "  ".join("-" * width for width in widths)
    heading, *body = (line.rstrip() for line in lines)
    return "\n".join([heading, rule, *body, measured(known[-1], intervals=False)])


def measured(row: ResultRow, *, intervals: bool = True) -> str:
    """How the accuracies of a row were measured, in one sentence for each attack."""
    text = [f"n = {row.num_samples} images{', Wilson 95 % intervals' if intervals else ''}, seed {row.seed}."]
    for name, used in row.settings.items():
        parts = [f"{attack_title(part)} {_how(how)}" for part, how in used.get("parts", {}).items()]
        told = "; ".join(parts) or _how(used)
        differs = f" It differs from the standard set: {used['differs']}." if "differs" in used else ""
        text.append(f"{attack_title(name, used)}: {row.norm} eps = {row.eps:.4g}, {told}.{differs}")
    return " ".join(text)


def _how(used: Mapping[str, Any]) -> str:
    """Steps or queries, loss, targets or starts of one attack."""
    one, many = ("query", "queries") if "queries" in used else ("step", "steps")
    amount = used[many]
    length = f" of {used['step_size']:.4g}" if "step_size" in used else ""
    loss = LOSS_TITLES.get(used["loss"], used["loss"])
    told = [f"{amount} {one if amount == 1 else many}{length} on the {loss}"]
    if targets := used.get("targets"):
        told.append(f"{targets} target{'s' if targets > 1 else ''}")
    if "random_start" in used:
        told.append("random start" if used["random_start"] else "no random start")
    told += [f"{used['restarts']} restarts"] if used.get("restarts", 1) > 1 else []
    return ", ".join(told)


def table_cells(rows: Sequence[ResultRow], *, intervals: bool = True) -> list[list[str]]:
    """The table's cells, heading first. Costs of later rows show their share of the first row's in brackets."""
    if not rows:
        raise ValueError("There are no rows to show.")
    ways = [(row.num_samples, row.norm, row.eps, row.seed, row.settings) for row in rows]
    if any(way != ways[0] for way in ways):
        raise ValueError(
            "The rows were measured in different ways (images, norm, eps, seed or steps): no common table."
        )
    first = rows[0]
    batches = list(dict.fromkeys(batch for row in rows for batch in row.latency))
    attacks = [name for name in first.accuracies if name != "clean"]
    titles = [attack_title(name, first.settings.get(name)) for name in attacks]
    heading = ["model", "clean", *titles, "parameters", "MACs"]
    with_files = any(row.file_size is not None for row in rows)
    heading += [f"ms, batch {batch}" for batch in batches] + with_files * ["file"]
    table = [heading]
    for row in rows:
        accuracies = [accuracy_text(row, name, interval=intervals) for name in ("clean", *attacks)]
        costs = [_share(row.parameters, first.parameters, _amount), _share(row.macs, first.macs, _amount)]
        costs += [f"{row.latency[batch]:.3g}" if batch in row.latency else "" for batch in batches]
        costs += with_files * [_share(row.file_size, first.file_size, lambda size: f"{_amount(size)}B")]
        table.append([row.name, *accuracies, *costs])
    return table


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """A pipe table, in which a name with a pipe stays one cell; empty without any line below the heading."""
    if len(cells) < 2:
        return ""
    heading, *lines = (f"| {' | '.join(map(_one_cell, line))} |" for line in cells)
    rule = "| " + " | ".join(["---", *["---:"] * (len(cells[0]) - 1)]) + " |"
    return "\n".join([heading, rule, *lines])


def _one_cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").splitlines())


def attack_title(name: str, settings: Mapping[str, Any] | None = None) -> str:
    """How an attack is called in tables; by its settings in a report, whether it is the set that is known as that."""
    reduced = " (not the standard set)" if settings and settings.get("standard") is False else ""
    return f"{ATTACK_TITLES.get(name, name)}{reduced}"


def accuracy_text(row: ResultRow, name: str, *, interval: bool = True) -> str:
    """`95.6 % [93.4, 97.1]`: accuracy and, if wanted, its interval in percent."""
    low, high = row.intervals[name]
    accuracy = f"{100 * row.accuracies[name]:.1f} %"
    return f"{accuracy} [{100 * low:.1f}, {100 * high:.1f}]" if interval else accuracy


def _share(value: int | None, whole: int | None, show: Callable[[int], str]) -> str:
    if value is None:
        return ""
    return f"{show(value)} ({100 * value / whole:.0f} %)" if whole and value != whole else show(value)


def _amount(value: int) -> str:
    """Three significant digits with a decimal prefix: 78042 is `78.0 k`."""
    for prefix, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.{3 - len(str(int(scaled)))}f} {prefix}"
    return f"{value} "
