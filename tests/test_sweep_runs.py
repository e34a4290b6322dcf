"""Cells that are done are skipped, those that fail are told and tried again; the table survives an interruption."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock
from sweep_runs_made import GRID, write_run

from hf_mrpf.sweep import sweep_cells
from hf_mrpf.sweep_config import read_config
from hf_mrpf.sweep_runs import Stopped, last_lines, pending, run_cells, run_process
from hf_mrpf.sweep_table import append_row, finished, read_rows

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def cells(tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID)
    return sweep_cells(read_config(tmp_path / "grid.yaml", overrides=["grid.seed=[0]"]))


class Launcher:
    """Stands for the processes: writes the run of a cell, or fails as it is told."""

    def __init__(self, cells, folder):
        self.cells, self.folder, self.failing, self.begun = {cell.name: cell for cell in cells}, folder, {}, []

    def __call__(self, words, out, err):
        name = Path(words[words.index("--output_dir") + 1]).name
        self.begun.append(name)
        out.write_text("output\n")
        err.write_text(self.failing.get(name, ""))
        if name in self.failing:
            return 2
        write_run(self.cells[name], self.folder)
        return 0


@pytest.fixture
def launcher(cells, tmp_path):
    return Launcher(cells, tmp_path)


def sweep(cells, launcher):
    """Does what is pending: the cells that are left, and the lines that were said."""
    said = []
    left = run_cells(
        pending(cells, launcher.folder),
        launcher.folder,
        lambda cell: cell.arguments(launcher.folder),
        launch=launcher,
        say=said.append,
    )
    return left, "\n".join(said)


def test_every_cell_is_a_line_with_its_settings_and_results(cells, launcher, tmp_path):
    left, said = sweep(cells, launcher)
    rows = read_rows(tmp_path / "table.jsonl")
    assert left == [] and [row["cell"] for row in rows] == [cell.name for cell in cells] == launcher.begun
    assert said.count("pgd20") == len(cells) and f"[{len(cells)}/{len(cells)}]" in said
    # A control is trained by the recipe of dense models, and may be a pruned shape.
    names = {"dense": "dense", "pruned": "fine-tuned", "dense-longer": "dense, same extra epochs"}
    names |= {"from-scratch": "shape from scratch, equal compute"}
    told = re.findall(r"^  (.*): clean .*pgd20", said, flags=re.MULTILINE)
    assert told == [names[cell.kind] for cell in cells] and len(set(told)) > 2
    row = rows[1]
    assert (row["kind"], row["status"], row["start"]) == ("pruned", "finished", cells[0].name)
    assert row["axes"] == {"architecture": "narrow", "seed": 0, "importance": "magnitude", "target": 0.5}
    assert row["settings"]["calibration_sets"] == 2 and row["options"] == cells[1].options
    assert row["results"]["models"]["fine-tuned"]["pgd20"] == pytest.approx(0.35)
    assert row["results"]["kept"] == {"macs": 0.5, "params": 0.5}
    assert list(row["results"]["module_scores"]) == ["layer0.conv", "layer1.conv", "layer2.conv"]


def test_finished_cells_are_skipped_and_new_ones_done(cells, launcher, tmp_path):
    sweep(cells[:3], launcher)
    assert [cell.name for cell in pending(cells, tmp_path)] == [cell.name for cell in cells[3:]]
    sweep(cells, launcher)
    assert len(launcher.begun) == len(cells) == len(set(launcher.begun))
    assert pending(cells, tmp_path) == []


def test_a_dense_model_whose_folder_is_gone_is_trained_again_only_if_it_is_needed(cells, launcher, tmp_path):
    sweep(cells[:3], launcher)
    (tmp_path / "runs" / cells[0].name / "config.json").unlink()
    assert pending(cells[:3], tmp_path) == []
    assert pending(cells[:4], tmp_path) == [cells[0], cells[3]]


def test_a_failed_cell_says_why_does_not_stop_the_rest_and_is_tried_again(cells, launcher, tmp_path):
    broken = cells[1]
    launcher.failing[broken.name] = "warm-up\nerror: The loss is nan at step 3\n"
    other = next(cell for cell in cells if cell.axes.get("importance") == "random")  # nothing starts from this one
    launcher.failing[other.name] = "error: another\n"
    left, said = sweep(cells, launcher)
    after = [cell for cell in cells if cell.start is broken]
    assert left == [broken, other, *after] and len(after) == 1
    assert "error: The loss is nan at step 3" in said
    assert f"not begun: {broken.name}, which it starts from, failed" in said
    rows = {row["cell"]: row for row in read_rows(tmp_path / "table.jsonl")}
    assert len(rows) == len(cells) - 1, "what was not begun has no line"
    assert rows[broken.name]["status"] == "failed"
    assert rows[broken.name]["reason"] == "exit status 2\nwarm-up\nerror: The loss is nan at step 3"

    launcher.failing.clear()
    assert sweep(cells, launcher)[0] == []
    assert launcher.begun[-3:] == [broken.name, other.name, after[0].name]
    assert set(finished(read_rows(tmp_path / "table.jsonl"))) == {cell.name for cell in cells}


def test_a_cell_that_another_call_is_doing_is_not_begun_and_its_log_left_alone(cells, launcher, tmp_path):
    sweep(cells[:1], launcher)
    logs, run = tmp_path / "logs", tmp_path / "runs" / cells[2].name
    run.mkdir(parents=True)
    (logs / f"{cells[1].name}.err").write_text("of the other call\n")
    # Of a cell that a call is doing, and of a run whose call was killed.
    locks = [FileLock(logs / f"{cells[1].name}.lock"), FileLock(run / "run.lock")]
    for lock in locks:
        lock.acquire()
        Path(lock.lock_file).write_text(f"{os.getppid()}\n")
    left, said = sweep(cells[:4], launcher)
    assert launcher.begun == [cells[0].name, cells[3].name] and left == cells[1:3]
    assert f"not begun here: it is being done by pid {os.getppid()}" in said
    assert f"is being written by another run (pid {os.getppid()}" in said
    assert (logs / f"{cells[1].name}.err").read_text() == "of the other call\n"
    assert [row["cell"] for row in read_rows(tmp_path / "table.jsonl")] == launcher.begun


def test_a_cell_that_another_call_finishes_in_the_meantime_is_not_done_again(cells, launcher, tmp_path):
    def both(words, out, err):
        """As the first cell is done here, another call ends the second one, and one that was failing here."""
        if not launcher.begun:
            append_row(tmp_path / "table.jsonl", row(cells[2].name, "failed"))
            for cell in cells[1:3]:
                write_run(cell, tmp_path)
                append_row(tmp_path / "table.jsonl", row(cell.name))
        return launcher(words, out, err)

    locked = FileLock(tmp_path / f"logs/{cells[2].name}.lock")
    said = []
    with locked:  # and it still holds the other
        left = run_cells(cells[:4], tmp_path, lambda cell: cell.arguments(tmp_path), launch=both, say=said.append)
    assert launcher.begun == [cells[0].name, cells[3].name] and left == []
    assert "  finished by another call in the meantime" in said and any("being done by" in line for line in said)


def test_a_run_that_ends_well_without_a_result_has_failed(cells, tmp_path):
    def launch(words, out, err):
        err.write_text("")
        return 0

    assert run_cells(cells[:1], tmp_path, lambda cell: ["x"], launch=launch, say=lambda line: None) == cells[:1]
    (row,) = read_rows(tmp_path / "table.jsonl")
    assert row["status"] == "failed" and "its result cannot be read" in row["reason"] and "run.json" in row["reason"]


def test_a_line_that_was_cut_short_is_dropped_and_its_cell_done_again(cells, launcher, tmp_path):
    sweep(cells[:3], launcher)
    table = tmp_path / "table.jsonl"
    whole = table.read_bytes()
    table.write_bytes(whole[:-40])
    assert [row["cell"] for row in read_rows(table)] == [cell.name for cell in cells[:2]]
    assert pending(cells[:3], tmp_path) == [cells[2]]
    sweep(cells[:3], launcher)
    rows = [json.loads(line) for line in table.read_text().splitlines()][1:]
    assert [row["cell"] for row in rows] == [cell.name for cell in cells[:3]]


def test_another_file_under_the_name_of_the_table_is_left_alone(tmp_path):
    table = tmp_path / "table.jsonl"
    table.write_text('{"subject": "something else"}\n{"days": "of work"}\n')
    for act in (lambda: append_row(table, {"cell": "a"}), lambda: read_rows(table)):
        with pytest.raises(ValueError, match="not the table of a sweep"):
            act()
    assert "days" in table.read_text()


def row(cell, status="finished"):
    return {"cell": cell, "status": status}


@pytest.mark.parametrize("damaged", [b"{oops\n", b"\xff\xfe\n", b"5\n", b'{"cell": "b"}\n', b"a\rb\n"])
def test_a_damaged_row_is_named_and_costs_no_other(tmp_path, damaged):
    table = tmp_path / "table.jsonl"
    for name in "abc":
        append_row(table, row(name))
    head, *lines = table.read_bytes().splitlines(keepends=True)
    for held in ([head, lines[0], damaged, *lines[1:]], [head, *lines, damaged]):
        table.write_bytes(b"".join(held))
        number = held.index(damaged) + 1
        for act in (lambda: append_row(table, row("d")), lambda: read_rows(table)):
            with pytest.raises(ValueError, match=rf"table\.jsonl, line {number} is not a row: .*; remove it"):
                act()
        assert table.read_bytes() == b"".join(held)
    table.write_bytes(b"".join([head, lines[0], b"\n", *lines[1:], b"\n", lines[0][:9]]))
    append_row(table, row("d"))
    assert [each["cell"] for each in read_rows(table)] == ["a", "b", "c", "d"], "a blank line is passed over"


def test_a_cell_that_ended_well_is_finished_whatever_another_call_says_of_it():
    rows = [row("a"), row("a", "failed"), row("b", "failed"), row("b") | {"seconds": 1}, row("c", "failed")]
    assert finished(rows) == {"a": rows[0], "b": rows[3]}


def test_many_writers_lose_no_line(tmp_path):
    table = tmp_path / "table.jsonl"
    writers = [
        threading.Thread(target=lambda n=n: [append_row(table, row(f"{n}-{i}")) for i in range(10)]) for n in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {row["cell"] for row in read_rows(table)} == {f"{n}-{i}" for n in range(4) for i in range(10)}


def test_a_reason_is_what_the_run_said_without_what_the_launcher_adds():
    launched = (
        "The following values were not passed to `accelerate launch` and had defaults used instead:\n"
        "\t`--num_processes` was set to a value of `0`\nTo avoid this warning pass in values.\n"
        "epoch 1\nerror: eps is 9\nTraceback (most recent call last):\n"
        '  File "launch.py", line 1, in <module>\n    main()\n'
        "subprocess.CalledProcessError: Command '['python', 'recipes/prune.py']' returned non-zero exit status 2.\n"
    )
    assert last_lines(launched).splitlines() == ["epoch 1", "error: eps is 9"]
    own = 'Traceback (most recent call last):\n  File "prune.py", line 9, in f\nKeyError: "a bug"\n'
    assert last_lines(own + launched.split("9\n", 1)[1]) == own.rstrip()
    assert last_lines("\n") == "nothing was written to standard error"


def test_a_process_gives_its_status_and_its_output_in_files(tmp_path):
    out, err = tmp_path / "out", tmp_path / "err"
    status = run_process(["sh", "-c", "echo yes; echo no >&2; exit 3"], out, err)
    assert (status, out.read_text(), err.read_text()) == (3, "yes\n", "no\n")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_run_and_is_waited_for(tmp_path, signum):
    script = "import signal, time, sys\n"
    script += "def stop(n, f): time.sleep(0.3); print('saved', n, flush=True); sys.exit(128 + n)\n"
    script += "signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGTERM, stop); print('up', flush=True)\n"
    script += "time.sleep(30)\n"
    out = tmp_path / "out"
    # As a launcher does: it ends at once, and what it started goes on for a moment.
    command = ["bash", "-c", 'trap "exit 1" INT TERM; "$@" & wait', "launcher", sys.executable, "-c", script]

    def interrupt():
        while not (out.is_file() and "up" in out.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signum)

    # What runs in the background may be started with Ctrl-C ignored, and what it starts would ignore it as well.
    outside = signal.signal(signum, signal.SIG_DFL)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(Stopped) as stop:
            run_process(command, out, tmp_path / "err")
        assert stop.value.signum == signum and signal.getsignal(signum) is signal.SIG_DFL
    finally:
        signal.signal(signum, outside)
    # A closed terminal is told as SIGTERM, at which a run saves its checkpoint.
    assert out.read_text() == ("up\nsaved 2\n" if signum == signal.SIGINT else "up\nsaved 15\n")


def recipe(monkeypatch, capsys, *options):
    """`recipes/sweep.py` in this process: its status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["recipes/sweep.py", *options])
    status = 0
    try:
        runpy.run_path(str(REPOSITORY / "recipes" / "sweep.py"), run_name="__main__")
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr()


def test_the_recipe_lists_writes_for_slurm_and_draws_what_is_there(cells, launcher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ("grid.yaml", "--set", "grid.seed=[0]", f"output_dir={tmp_path}")
    status, shown = recipe(monkeypatch, capsys, *common, "--dry_run")
    lines = shown.out.splitlines()
    assert status == 0 and lines[-1] == f"{len(cells)} cells, {len(cells)} to do"
    assert [line.split()[1].rstrip(":") for line in lines[:-1:2]] == [cell.name for cell in cells]
    assert all(
        re.match(r"    accelerate launch \S*recipes/(train|prune)\.py --output_dir ", line) for line in lines[1::2]
    )
    assert not (tmp_path / "table.jsonl").exists() and not (tmp_path / "runs").exists()

    status, shown = recipe(monkeypatch, capsys, *common, "--show_only")
    assert status == 0 and "nothing is drawn" in shown.out
    sweep(cells[:3], launcher)
    status, shown = recipe(monkeypatch, capsys, *common, "--show_only")
    assert status == 0 and f"3 of {len(cells)} cells in" in shown.out and (tmp_path / "grid.png").stat().st_size > 5000
    _, shown = recipe(monkeypatch, capsys, *common, "--dry_run")
    assert shown.out.count(": finished") == 3 and f"{len(cells) - 3} to do" in shown.out

    status, shown = recipe(monkeypatch, capsys, *common, "--slurm", "jobs/submit.sh")
    assert status == 0 and f"{len(cells)} cells in jobs/submit.sh" in shown.out
    assert f"'grid.seed=[0]' output_dir={tmp_path} --cell $SLURM_ARRAY_TASK_ID" in (
        (tmp_path / "jobs/submit.sh").read_text().replace("'\"'\"'", "'")
    )

    before = ("--set", "grid.seed=[0]", f"output_dir={tmp_path}", "--slurm", "jobs/other.sh", "grid.yaml")
    assert recipe(monkeypatch, capsys, *before)[0] == 0
    assert "sweep.py grid.yaml --set " in (tmp_path / "jobs/other.sh").read_text()  # which would take what follows it

    for options, message in (
        (("--cell", "99"), f"the sweep has cells 0 to {len(cells) - 1}"),
        (("--set", "importance=lamp"), "of the axis importance sets it"),
    ):
        status, shown = recipe(monkeypatch, capsys, *common, *options)
        assert status == 2 and shown.err.startswith("error: ") and message in shown.err


@pytest.mark.slow
def test_two_cells_on_the_digits_and_their_controls(tmp_path):
    options = [
        *("recipes/configs/criteria.yaml", "--small", "--set", f"output_dir={tmp_path}", "grid.target=[0.6]"),
        *("max_train_samples=64", "max_eval_samples=20", "dense.num_train_epochs=1", "prune.num_train_epochs=1"),
        *("use_cpu=true", "calibration_set_size=16"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "recipes/sweep.py", *options]

    def call(*more):
        return subprocess.run([*command, *more], cwd=REPOSITORY, env=environment, capture_output=True, text=True)

    first = call()
    assert first.returncode == 0, first.stdout + first.stderr
    rows = {(row["kind"], row["axes"].get("importance")): row for row in read_rows(tmp_path / "table.jsonl")}
    assert {kind for kind, _ in rows} == {"dense", "pruned", "dense-longer", "from-scratch"} and len(rows) == 5
    pruned, scratch = rows["pruned", "magnitude"]["results"], rows["from-scratch", "magnitude"]["results"]
    assert scratch["models"]["dense"]["macs"] == pruned["models"]["fine-tuned"]["macs"]
    # A part of a step is a whole one, and two steps are an epoch here.
    assert 0 <= scratch["epochs"]["dense"] - (1 / pruned["kept"]["macs"] + 1) < 0.5
    assert scratch["images"] == pruned["images"] and scratch["split"] == "test"
    assert (tmp_path / "criteria-small.png").is_file()
    again = call()
    assert again.returncode == 0 and "5 cells, 0 to do" in again.stdout
