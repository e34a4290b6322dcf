"""Ways to do the same work, timed in turns in one process; reports and tables of what was measured."""

import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import transformers

from hf_mrpf.efficiency import device_name

RESULTS = Path(__file__).parent / "results"


def interleaved(
    ways: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, *, warm: bool = True
) -> dict[str, dict[str, Any]]:
    """
    Seconds of each way, by the processor's clock and by the wall's, every round in turn; with `warm` one more warms up.

    Returns:
        `dict`: by way `{"cpu": [seconds a round], "wall": [seconds a round]}`.
    """
    seconds: dict[str, dict[str, Any]] = {name: {"cpu": [], "wall": []} for name in ways}
    for number in range(0 if warm else 1, rounds + 1):
        for name, way in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[name]["cpu"].append(time.process_time() - cpu)
                seconds[name]["wall"].append(time.perf_counter() - wall)
    return seconds


def ratio(seconds: Mapping[str, Mapping[str, list[float]]], way: str, reference: str, clock: str) -> float:
    """How many times faster a way is than the reference: the median over rounds of the ratios within a round."""
    return median(a / b for a, b in zip(seconds[reference][clock], seconds[way][clock], strict=True))


def clock_of(device: torch.device) -> str:
    """Processor time does not see what else a machine does; a GPU's work is seen on the wall alone."""
    return "wall" if device.type == "cuda" else "cpu"


def own_command() -> str:
    """The command that runs, its folders given by their names alone: where they are is nobody's business."""
    options = [Path(option).name if Path(option).is_dir() else option for option in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *options])


def report(name: str, device: torch.device, threads: int, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Writes `results/<name>.json`, or `<name>-cuda.json`, with the command, versions, device and threads."""
    content = {
        "command": own_command(),
        "device": device_name(device),
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "timm": timm.__version__,
        },
        **more,
        "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}{'' if device.type == 'cpu' else f'-{device.type}'}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def table(heads: list[str], rows: list[list[Any]]) -> str:
    """Markdown; numbers to the right."""
    right = [all(isinstance(row[column], int | float | None) for row in rows) for column in range(len(heads))]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---:" if side else "---" for side in right) + " |"]
    for row in rows:
        cells = ["-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
