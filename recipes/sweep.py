"""
Runs a grid of prunings from one file, each of them a resumable run of its own, and draws what came of it.

    python recipes/sweep.py recipes/configs/criteria.yaml --dry_run        # the cells and their commands
    python recipes/sweep.py recipes/configs/criteria.yaml --small          # a few minutes on the embedded digits
    python recipes/sweep.py recipes/configs/criteria.yaml                  # the whole of it

The same command goes on where the sweep was: finished cells are skipped, failed ones tried again. Every cell that ends
is one line in table.jsonl of the sweep's folder, with all its settings. Cells that are independent can go to Slurm:

    python recipes/sweep.py recipes/configs/criteria.yaml --slurm outputs/criteria.sh
    bash outputs/criteria.sh --partition=gpu --gpus=1
"""

import argparse
import shlex
import sys
from pathlib import Path

from hf_mrpf.console import errors_told


def parse_arguments() -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=as_written, usage="python recipes/sweep.py CONFIG [options]"
    )
    parser.add_argument("config", help="YAML file of the sweep; those of the paper are in recipes/configs")
    parser.add_argument("--small", action="store_true", help="with the changes that the file has under `small`")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="an option for every run (max_train_samples=200), or a place in the file (grid.seed=[0,1])",
    )  # fmt: skip
    parser.add_argument(
        "--accelerate", default="", metavar="OPTIONS",
        help="options of accelerate launch, such as '--config_file recipes/accelerate/single_gpu.yaml'",
    )  # fmt: skip
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--dry_run", action="store_true", help="only list the cells, which are done, and the commands")
    way.add_argument("--show_only", action="store_true", help="only draw or print what the table holds")
    way.add_argument("--cell", type=int, nargs="+", metavar="N", help="only do these cells, as --dry_run counts them")
    way.add_argument("--slurm", metavar="FILE", help="only write a script that submits the cells as Slurm job arrays")
    return parser.parse_args()


ARGUMENTS = None
if __name__ == "__main__":
    with errors_told():
        ARGUMENTS = parse_arguments()

# ruff: noqa: E402
from hf_mrpf.slurm import slurm_script
from hf_mrpf.sweep import Cell, check_cells, command, shown, sweep_cells
from hf_mrpf.sweep_config import SweepConfig, read_config
from hf_mrpf.sweep_runs import Stopped, pending, run_cells, run_process
from hf_mrpf.sweep_show import check_show, show_rows
from hf_mrpf.sweep_summary import rows_of
from hf_mrpf.sweep_table import TABLE, finished, read_rows

RECIPES = Path(sys.argv[0]).parent


def main() -> None:
    arguments = ARGUMENTS or parse_arguments()
    config = read_config(arguments.config, small=arguments.small, overrides=arguments.set)
    cells = sweep_cells(config)
    check_show(config, cells)
    wanted = cells if arguments.cell is None else [cell_number(number, cells) for number in arguments.cell]
    check_cells(wanted)
    launcher = shlex.split(arguments.accelerate)

    def command_of(cell: Cell) -> list[str]:
        return command(cell, config.output_dir, RECIPES, launcher)

    folder = Path(config.output_dir)
    to_do = [cell for cell in pending(cells, folder) if cell in wanted]
    if arguments.dry_run:
        for number, cell in enumerate(cells):
            print(f"{number} {cell.name}: {'to do' if cell in to_do else 'finished'}\n    {shown(command_of(cell))}")
        print(f"{len(cells)} cells, {len(to_do)} to do")
    elif arguments.slurm:
        write_script(Path(arguments.slurm), cells, arguments)
    elif arguments.show_only:
        show(config, cells)
    else:
        print(f"{len(wanted)} cells, {len(to_do)} to do; table in {folder / TABLE}", flush=True)
        left = run_cells(to_do, folder, command_of, launch=run_process, say=lambda line: print(line, flush=True))
        if arguments.cell is None:
            show(config, cells)
        if left:
            print(f"error: {len(left)} of {len(wanted)} cells are not finished", file=sys.stderr)
            raise SystemExit(1)


def cell_number(number: int, cells: list[Cell]) -> Cell:
    """The cell of a number of `--dry_run`."""
    if not 0 <= number < len(cells):
        raise ValueError(f"--cell {number}: the sweep has cells 0 to {len(cells) - 1}; see --dry_run.")
    return cells[number]


def show(config: SweepConfig, cells: list[Cell]) -> None:
    """Draws or prints the finished rows, saying how many of how many they are."""
    rows = rows_of(cells, finished(read_rows(Path(config.output_dir) / TABLE)))
    if not any(row["kind"] == "pruned" for row in rows):
        print("no pruned cell has finished yet: nothing is drawn")
        return
    files, text = show_rows(config, rows)
    if text:
        print(text)
    print(f"{len({row['cell'] for row in rows})} of {len(cells)} cells in {', '.join(map(str, files))}", flush=True)


def write_script(file: Path, cells: list[Cell], arguments: argparse.Namespace) -> None:
    """Writes the script for Slurm, whose jobs call this recipe with the same file and the same changes."""
    words = [sys.argv[0], arguments.config]  # first: --set would take it for a change
    words += ["--small"] if arguments.small else []
    words += ["--set", *arguments.set] if arguments.set else []
    words += [f"--accelerate={arguments.accelerate}"] if arguments.accelerate else []
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(slurm_script(cells, ["python", *words]), encoding="utf-8")
    print(
        f"{len(cells)} cells in {file}; submit them from this folder: bash {shlex.quote(str(file))} [options of sbatch]"
    )


if __name__ == "__main__":
    with errors_told():
        try:
            main()
        except Stopped as stop:
            print(f"\nstopped by {stop}. What was finished is kept, and the same command goes on.", file=sys.stderr)
            raise SystemExit(128 + stop.signum) from None
