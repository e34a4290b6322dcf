"""Runs of a sweep as the recipes leave them, without what takes time; figures follow from the cell by simple rules."""

import json
from pathlib import Path

from hf_mrpf.sweep import Cell, run_folder
from hf_mrpf.sweep_table import results_of, row_of

GRID = """
common: {max_train_samples: 100}
dense: {num_train_epochs: 4}
prune: {num_train_epochs: 2, calibration_sets: 2}
grid:
  architecture: {narrow: {model_name_or_path: timm/resnet18, small_images: true, backbone_kwargs: {layers: [1, 1]}}}
  importance: [magnitude, random]
  target: [0.5, 0.25]
  seed: [0, 1]
controls: {dense_longer: true, from_scratch: {importance: [magnitude]}}
show: {kind: lines, lines: importance}
small: {grid.seed: [0], common.max_train_samples: 10, prune.calibration_sets: 1}
"""
MACS, PARAMETERS = 2_000_000, 40_000


def accuracy(cell: Cell) -> float:
    """Robust accuracy of what a cell ends with."""
    seed = 0.02 * cell.axes.get("seed", 0)
    if cell.kind == "pruned":
        return 0.3 + seed + 0.1 * cell.axes["target"] - (0.05 if cell.axes.get("importance") == "random" else 0)
    return {"dense": 0.4, "dense-longer": 0.42, "from-scratch": 0.35}[cell.kind] + seed


def write_run(cell: Cell, output_dir: Path) -> None:
    """The files of a finished run that a sweep reads."""
    folder = run_folder(output_dir, cell)
    folder.mkdir(parents=True, exist_ok=True)
    kept = cell.axes["target"] if cell.kind in ("pruned", "from-scratch") else 1.0
    dense = _model("dense" if cell.kind == "pruned" else "this model", accuracy(cell), 1.0)
    table = [dense | {"macs": int(kept * MACS)}]
    if cell.kind == "pruned":
        parent = _model("dense", accuracy(cell.start), 1.0)
        table = [parent, _model("pruned", accuracy(cell) / 2, kept), _model("fine-tuned", accuracy(cell), kept)]
    report = {
        **{"num_samples": 100, "images": f"seed {cell.axes.get('seed')}", "norm": "linf", "eps": 0.1},
        **{"versions": {"torch": "2"}, "device": "cpu", "split": "validation" if cell.kind == "dense" else "test"},
        **{"table": table, "stages": {"dense": {"epochs": 4}, "pruned": {"seconds": 1}}},
    }
    scores = {f"layer{place}.conv": 10.0 ** -(place + 1) for place in range(3)}
    plan = {"module_scores": scores, "scores": {"unit": 0.1}, "ratios": {"unit": 0.5}, "achieved": {"macs": kept}}
    settings = cell.options | {"target_metric": "macs"}
    for name, content in {
        "config.json": {},
        "run.json": {"settings": settings, "finished": True},
        "robustness_report.json": report,
        **({"pruning_plan.json": plan} if cell.kind == "pruned" else {}),
    }.items():
        (folder / name).write_text(json.dumps(content))


def made_rows(cells: list[Cell], output_dir: Path) -> list[dict]:
    """Rows of cells that ended well, as they come out of a table."""
    rows = []
    for cell in cells:
        write_run(cell, output_dir)
        rows.append(row_of(cell, status="finished", seconds=1.0, **results_of(run_folder(output_dir, cell))))
    return json.loads(json.dumps(rows))


def _model(name: str, robust: float, kept: float) -> dict:
    accuracies = {"clean": 2 * robust, "fgsm": robust, "pgd20": robust, "cw": robust}
    return {
        **{"name": name, "accuracies": accuracies, "latency": {}},
        **{"parameters": int(kept * PARAMETERS), "macs": int(kept * MACS)},
    }
