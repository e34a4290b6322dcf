"""The table of a sweep: one JSON line for every cell that has ended, with its settings and what came of it."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from .journal import Journal, parse_line, whole_lines
from .run_folder import STATE_FILE, read_json
from .sweep import Cell

TABLE = "table.jsonl"
SUBJECT = {"table": "hf_mrpf sweep", "format": 1}
# Of the rows of a result: what they call the last model, and what a sweep does.
MODELS_OF_TRAINING = {"this model": "dense"}
Row = dict[str, Any]


def append_row(table: Path, row: Mapping[str, Any]) -> None:
    """
    Puts a row on disk. A last line that was cut short is dropped first; several processes may do this at once.

    Raises:
        ValueError: where the file is not the table of a sweep, or a line is damaged: it is left as it is.
    """
    table.parent.mkdir(parents=True, exist_ok=True)
    # Tasks of a Slurm array end when they like, and share the file.
    with FileLock(str(table.with_suffix(".lock"))):
        read_rows(table)  # a journal would find again what follows a damaged line, which here took days
        with Journal(table, SUBJECT, keep=True) as journal:
            journal.add(row)


def read_rows(table: Path) -> list[Row]:
    """
    All whole rows of a table, in the order in which cells ended; none where there is no table yet.

    A last row that was cut short is left out: its cell is done again.

    Raises:
        ValueError: where the file is not the table of a sweep, or a line of it is no row, with its number.
    """
    if not table.is_file():
        return []
    _refuse_other(table)
    rows = []
    for number, line in enumerate(whole_lines(table.read_bytes())[1:], start=2):
        if not line.strip():
            continue
        row = parse_line(line)
        if row is None or not {"cell", "status"} <= row.keys():
            start = line[:40].decode(errors="replace").strip()
            raise ValueError(f"{table}, line {number} is not a row: {start!r}; remove it, and its cell is done again.")
        rows.append(row)
    return rows


def _refuse_other(table: Path) -> None:
    """A journal moves one about anything else aside, which here would cost days."""
    if not table.is_file():
        return
    with table.open("rb") as file:
        first = file.readline()
    if first.endswith(b"\n") and json.dumps({"subject": SUBJECT}).encode() != first.strip():
        raise ValueError(f"{table} is not the table of a sweep of this format: its first line says otherwise. Move it.")


def latest(rows: Iterable[Row]) -> dict[str, Row]:
    """The last row of each cell, by the cell's name: one that failed and was tried again has several."""
    return {row["cell"]: row for row in rows}


def finished(rows: Iterable[Row]) -> dict[str, Row]:
    """The rows of the cells that ended well at any time, by the cell's name: a failure before or after counts less."""
    return latest(row for row in rows if row["status"] == "finished")


def row_of(cell: Cell, **outcome: Any) -> Row:
    """A cell and what it was asked for; `outcome` is `status`, `seconds`, and `reason` or `settings` and `results`."""
    start = {"start": cell.start.name} if cell.start else {}
    return {"cell": cell.name, "kind": cell.kind, "axes": cell.axes, **start, "options": cell.options, **outcome}


def results_of(folder: Path) -> dict[str, Any]:
    """
    What a finished run of `recipes/prune.py` or `recipes/train.py` found, and every setting that it had.

    Returns:
        `dict`: `settings`, and under `results`: `models`, by stage their accuracies (fractions), parameters,
        multiply-accumulates, latencies (ms); the `split`, `num_samples` and `images` (a hash) they are of; `epochs` by
        stage; of a pruned one also what is `kept` (fractions), and of its first round `module_scores` and `scores` of
        units (nats) and `ratios`.

    Raises:
        ValueError, OSError: where the folder holds no finished run.
    """
    state, report = read_json(folder / STATE_FILE), read_json(folder / "robustness_report.json")
    if not state.get("finished"):
        raise ValueError(f"{folder} holds a run that is not finished.")
    models = {}
    for row in report["table"]:
        costs = {name: row[name] for name in ("parameters", "macs", "latency") if row.get(name)}
        models[MODELS_OF_TRAINING.get(row["name"], row["name"])] = row["accuracies"] | costs
    results = {
        "models": models,
        "split": report.get("split", "test"),
        **{name: report[name] for name in ("num_samples", "images", "norm", "eps", "versions", "device")},
        "epochs": {name: stage["epochs"] for name, stage in report["stages"].items() if "epochs" in stage},
    }
    plan = folder / "pruning_plan.json"
    if plan.is_file():
        content = read_json(plan)
        rounds = content.get("rounds", [content])
        results |= {name: rounds[0][name] for name in ("module_scores", "scores", "ratios")}
        sizes = {"macs": "macs", "params": "parameters"}
        small, large = models["fine-tuned"], models["dense"]
        results["kept"] = {name: small[size] / large[size] for name, size in sizes.items()}
        if all("latency" in each["achieved"] for each in rounds):
            results["kept"]["latency"] = math.prod(each["achieved"]["latency"] for each in rounds)
    return {"settings": state["settings"], "results": results}
