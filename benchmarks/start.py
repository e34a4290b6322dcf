"""
How long imports and the command line take, each in a fresh process, beside what they need of other libraries.

    python benchmarks/start.py    # writes benchmarks/results/start.json

Processes take turns and the first round, which writes their bytecode, is not counted. Seconds are those of the whole
process, by the processor's clock and by the wall's; what is wanted are differences within a round.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from side_by_side import report, table

REPOSITORY = Path(__file__).parent.parent
AUTO = "import torch; from transformers import AutoModelForImageClassification"
ARGUMENTS = "from transformers import TrainingArguments"
PRUNE = "recipes/prune.py"
BESIDE = {"registration": ["-c", AUTO], "TrainingArguments": ["-c", ARGUMENTS]}
# What is started, beside what, and how many seconds more it may take.
STARTS: dict[str, tuple[list[str], str, float]] = {
    "import hf_mrpf": (["-c", "import hf_mrpf"], "registration", 0.5),
    **{
        f"prune.py {options}": ([PRUNE, *options.split()], "TrainingArguments", 2.0)
        for options in (
            "--help",
            "--no_such_option 1",
            "--target 1.5",
            "--eps 9",
            "--pruning_rounds 0",
            "--backbone_kwargs oops",
            "--model_name_or_path ./nosuch",
            "--save_strategy sometimes",
            "--eval_strategy no --load_best_model_at_end",
        )
    },
}


def seconds_of(command: Sequence[str]) -> tuple[float, float]:
    """CPU and wall seconds of a process, which may refuse its arguments."""
    # Bytecode is kept as it is for users, whatever the shell says.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 2):
        raise RuntimeError(done.stderr.decode())
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    commands = BESIDE | {name: command for name, (command, _, _) in STARTS.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in commands}
    for number in range(args.rounds + 1):
        for name, command in commands.items():
            for clock, value in zip(("cpu", "wall"), seconds_of(command), strict=True):
                if number:
                    seconds[name][clock].append(value)
    rows: list[dict[str, Any]] = []
    for name, (_, beside, target) in STARTS.items():
        row: dict[str, Any] = {"start": name, "beside": beside}
        for clock in ("cpu", "wall"):
            pairs = list(zip(seconds[name][clock], seconds[beside][clock], strict=True))
            row |= {clock: median(seconds[name][clock]), f"beside_{clock}": median(seconds[beside][clock])}
            row |= {f"more_{clock}": median(a - b for a, b in pairs), f"ratio_{clock}": median(a / b for a, b in pairs)}
        rows.append(row | {"target_more": target, "seconds": seconds[name], "beside_seconds": seconds[beside]})
    report("start", torch.device("cpu"), torch.get_num_threads(), rows, rounds=args.rounds)
    keys = ["start", "beside", "cpu", "beside_cpu", "ratio_cpu", "more_cpu", "more_wall", "target_more"]
    print(table(["start", "beside", "CPU s", "beside", "ratio", "more CPU s", "more wall s", "target"],
                [[row[key] for key in keys] for row in rows]))  # fmt: skip


if __name__ == "__main__":
    main()
