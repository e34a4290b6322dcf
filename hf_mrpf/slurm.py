"""Handing a sweep over to Slurm: a script that submits its cells as job arrays, each after the ones it starts from."""

import itertools
import shlex
from collections.abc import Sequence

from .sweep import RANKS, Cell

LAST = "last"


def slurm_script(cells: Sequence[Cell], sweep: Sequence[str]) -> str:
    """
    A shell script that submits a sweep.

    One array for each rank of cells, whose tasks are the numbers of cells; an array waits until the one before has
    ended, well or not, since a failed dense model concerns its own cells alone. What the script is called with goes to
    every `sbatch`. Figures and tables are drawn at the end.

    Args:
        cells (`Sequence[Cell]`): all cells of the sweep.
        sweep (`Sequence[str]`): command of `recipes/sweep.py` with the file and the changes that these cells are of.

    Returns:
        `str`: for `bash`.
    """
    call = shlex.join(sweep)
    lines = [
        "#!/usr/bin/env bash",
        f"# Submits the {len(cells)} cells of a sweep to Slurm. Options of sbatch go to every job:",
        "#     bash THIS_FILE --partition=gpu --gpus=1 --time=8:00:00",
        "# Submitted again it does what is not finished. Made by: " + " ".join(call.split()),
        "set -euo pipefail",
        f"{LAST}=",
    ]
    for _, rank in itertools.groupby(enumerate(cells), key=lambda item: RANKS[item[1].kind]):
        numbers = [number for number, _ in rank]
        kinds = ", ".join(dict.fromkeys(cells[number].kind for number in numbers))
        task = f"{call} --cell $SLURM_ARRAY_TASK_ID"
        lines += [f"# {kinds}", _submitted(f"--array={numbers[0]}-{numbers[-1]}", task)]
    lines += ["# figures and tables", _submitted("", f"{call} --show_only"), f'echo "last job: ${LAST}"', ""]
    return "\n".join(lines)


def _submitted(options: str, task: str) -> str:
    after = f"${{{LAST}:+--dependency=afterany:${LAST}}}"
    words = ["sbatch --parsable", '"$@"', options, after, f"--wrap {shlex.quote(task)}"]
    return f"{LAST}=$({' '.join(word for word in words if word)})"
