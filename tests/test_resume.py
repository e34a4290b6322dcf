"""A run that is killed anywhere goes on with the same command, and ends with the same weights, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NETWORK = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_type": "deep", "stem_width": 8}
# Two steps an epoch on one process, one on two.
TINY = [
    *("--backbone_kwargs", json.dumps(NETWORK), "--max_train_samples", "64", "--max_eval_samples", "24"),
    *("--base_epochs", "3", "--num_train_epochs", "2", "--control_epochs", "0", "--num_steps", "1"),
    *("--calibration_sets", "2", "--calibration_set_size", "16", "--sensitivity_steps", "1", "--eval_num_steps", "1"),
    *("--recalibration_samples", "32", "--disable_tqdm", "True", "--use_cpu"),
]
STAGES = ("dense", "pruned", "fine-tuned")
# Where kills fall at least once: a phase of the run, and what the name of the place begins with.
PHASES = (
    ("dense training", ""),
    ("MRS", ""),
    ("planning", ""),
    ("pruning", ""),
    ("fine-tuned training", ""),
    ("evaluation", ""),
    ("checkpoint", ""),
    ("checkpoint", "half of"),
    ("stage result", ""),
    ("writing the result", ""),
    ("publishing", ""),
    ("between stages", ""),
)


@dataclass
class Run:
    """What one start of the recipe did."""

    statuses: list[int]
    places: list[list[tuple[str, str]]]  # by rank: phase and place, in order
    output: str
    again: "Run | None" = None  # the start after it, where the test makes one

    def phases(self) -> set[str]:
        return {phase for phase, _ in self.places[0]}

    def steps(self, stage: str) -> int:
        return self.places[0].count((f"{stage} training", "before training_step"))

    def evaluations(self, stage: str) -> int:
        return self.places[0].count((f"{stage} training", "before evaluate"))


class Recipe:
    """Client of resume_server.py."""

    def __init__(self, logs: Path):
        self.logs, self.count = logs, 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
        self.process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests" / "resume_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(logs / "server.err").open("w"),
            text=True,
            env=environment,
            cwd=REPOSITORY,
        )
        assert self.process.stdout.readline() == "ready\n", (logs / "server.err").read_text()

    def __call__(self, folder, *options, world_size=1, stop_at=None, rank=0, signum=signal.SIGKILL) -> Run:
        log = self.logs / str(self.count)
        self.count += 1
        request = {
            "options": ["--output_dir", str(folder), *TINY, *options],
            "world_size": world_size,
            "log": str(log),
            "stop_at": stop_at,
            "stopped_rank": rank,
            "signum": signum,
            "timeout": 300,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        places = [
            [tuple(line.split("\t")) for line in Path(f"{log}.places{rank}").read_text().splitlines()]
            for rank in range(world_size)
        ]
        output = "".join(Path(f"{log}.out{rank}").read_text() for rank in range(world_size))
        return Run(answer["statuses"], places, output)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    running = Recipe(tmp_path_factory.mktemp("logs"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """Uninterrupted runs by world size: folder and what they did; each is made once."""
    made = {}

    def get(world_size: int) -> tuple[Path, Run]:
        if world_size not in made:
            folder = tmp_path_factory.mktemp("whole") / str(world_size)
            run = recipe(folder, world_size=world_size)
            assert run.statuses == [0] * world_size, run.output[-3000:]
            assert {phase for phase, _ in PHASES} <= run.phases()
            made[world_size] = folder, run
        return made[world_size]

    return get


def chosen_places(run: Run, phases, count: int, seed: int) -> list[tuple[int, int]]:
    """Rank and number of `count` places: one in each of `phases`, the others anywhere, on any process."""
    generator = random.Random(seed)
    chosen = []
    for phase, start in phases:
        fitting = [n for n, (found, place) in enumerate(run.places[0]) if found == phase and place.startswith(start)]
        chosen.append((0, generator.choice(fitting)))
    while len(chosen) < count:
        rank = generator.randrange(len(run.places))
        chosen.append((rank, generator.randrange(len(run.places[rank]))))
    return chosen


def finished_stages(folder: Path) -> list[str]:
    return [stage for stage in STAGES if (folder / "stages" / stage / "stage.json").exists()]


def kill_and_go_on(recipe, whole, folder: Path, world_size: int, rank: int, number: int) -> str:
    """One kill, and the same command again; what it was, in a few words."""
    reference, uninterrupted = whole(world_size)
    phase, place = uninterrupted.places[rank][number]
    name = f"{phase}: {place} (place {number} of process {rank})"
    killed = recipe(folder, world_size=world_size, stop_at=number, rank=rank)
    assert killed.statuses[rank] == -signal.SIGKILL, f"{name}\n{killed.output[-3000:]}"
    assert 0 not in killed.statuses, name  # the other process is killed too, or has seen that its peer is gone
    assert killed.places[rank] == uninterrupted.places[rank][: number + 1], name
    done = finished_stages(folder)
    scored = killed.places[0].count(("MRS", "ends")) > 0
    again = recipe(folder, world_size=world_size)
    assert again.statuses == [0] * world_size, f"{name}\n{again.output[-3000:]}"
    for stage in done:
        assert f"[{stage}] kept from before" in again.output, name
        assert again.steps(stage) == 0, name
    if scored:
        # Every score is in the journal; one gradient tells whether the network is that of the journal.
        assert again.places[0].count(("MRS", "before grad")) <= 1, name
    if "pruned" in done:
        assert not {"planning", "pruning"} & again.phases(), name
    for file in ("model.safetensors", "pruning_plan.json", "config.json"):
        assert (folder / file).read_bytes() == (reference / file).read_bytes(), f"{name}: {file} differs"
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}, name
    assert not list((folder / "stages").rglob("checkpoint-*")), name
    return name


def test_a_kill_in_training_and_in_the_middle_of_publishing(recipe, whole, tmp_path):
    _, run = whole(1)
    for rank, number in chosen_places(run, [("dense training", "before"), ("publishing", "before")], 2, seed=7):
        kill_and_go_on(recipe, whole, tmp_path / str(number), 1, rank, number)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_kills_anywhere(recipe, whole, tmp_path, world_size, record_property):
    _, run = whole(world_size)
    done = []
    for rank, number in chosen_places(run, PHASES, count=14, seed=20241 + world_size):
        done.append(kill_and_go_on(recipe, whole, tmp_path / str(len(done)), world_size, rank, number))
        print("killed in", done[-1])
    assert len(done) >= 12
    record_property(
        "summary",  # shown at the end, see conftest.py
        f"{len(done)} kills on {world_size} process(es), each gone on with to the same bits:\n  " + "\n  ".join(done),
    )


@pytest.mark.slow
def test_a_kill_with_a_teacher_an_average_and_perturbed_weights(recipe, tmp_path):
    switches = ("--objective", "rslad", "--ema_decay", "0.8", "--awp_gamma", "0.01", "--importance", "fisher")
    whole = recipe(tmp_path / "whole", *switches)
    assert whole.statuses == [0], whole.output[-3000:]
    assert "[dense] objective=trades" in whole.output and "[fine-tuned] objective=rslad" in whole.output
    card = (tmp_path / "whole" / "README.md").read_text()
    for name, value in (
        ("objective", "rslad"), ("objective of the dense model", "trades"), ("ema_decay", "0.8"), ("awp_gamma", "0.01")
    ):  # fmt: skip
        assert f"| {name} | {value} |" in card
    settings = json.loads((tmp_path / "whole" / "run.json").read_text())["settings"]
    assert (settings["objective"], settings["ema_decay"], settings["awp_gamma"]) == ("rslad", 0.8, 0.01)
    for stage, nth in (("dense", 3), ("fine-tuned", 3)):  # after the first checkpoint
        number = number_of(whole, f"{stage} training", "before training_step", nth)
        killed = recipe(tmp_path / stage, *switches, stop_at=number)
        assert killed.statuses == [-signal.SIGKILL]
        again = recipe(tmp_path / stage, *switches)
        assert again.statuses == [0], again.output[-3000:]
        assert "resumed_from=checkpoint-2" in again.output
        for file in ("model.safetensors", "pruning_plan.json"):
            assert (tmp_path / stage / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), (stage, file)


def number_of(run: Run, phase: str, place: str, nth: int) -> int:
    """Number of the `nth` pass, from 1, of a place on the main process."""
    return [number for number, found in enumerate(run.places[0]) if found == (phase, place)][nth - 1]


def stop_and_go_on(recipe, whole, folder: Path, world_size: int, number: int, signum: int, rank: int = 0) -> Run:
    """A signal at a place, and the same command again."""
    reference, _ = whole(world_size)
    stopped = recipe(folder, world_size=world_size, stop_at=number, rank=rank, signum=signum)
    assert set(stopped.statuses) == {128 + signum}, stopped.output[-3000:]
    assert stopped.output.count("stopped by") == 1
    assert f"stopped by {signal.Signals(signum).name}" in stopped.output
    command = stopped.output.split("The same command goes on:\n\n")[1].splitlines()[0]
    assert command.startswith("    ")
    assert "Traceback" not in stopped.output
    again = recipe(folder, world_size=world_size)
    assert again.statuses == [0] * world_size, again.output[-3000:]
    assert (folder / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    stopped.again = again
    return stopped


def test_ctrl_c_in_mid_epoch_finishes_the_step_and_saves(recipe, whole, tmp_path):
    _, run = whole(1)
    third = number_of(run, "dense training", "before training_step", 3)
    stopped = stop_and_go_on(recipe, whole, tmp_path / "run", 1, third, signal.SIGINT)
    assert stopped.steps("dense") == 3
    assert f"Saved: {tmp_path / 'run' / 'stages' / 'dense' / 'training' / 'checkpoint-3'}." in stopped.output
    assert stopped.again.steps("dense") == 3
    assert "resumed_from=checkpoint-3" in stopped.again.output


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("nth", [2, 6])
def test_a_signal_in_the_last_step_of_an_epoch_waits_for_its_evaluation(recipe, whole, tmp_path, nth, signum):
    _, run = whole(1)
    last = number_of(run, "dense training", "after training_step", nth)
    stopped = stop_and_go_on(recipe, whole, tmp_path / "run", 1, last, signum)
    assert stopped.steps("dense") == nth
    assert stopped.again.steps("dense") == 6 - nth
    assert run.evaluations("dense") == 3
    assert (stopped.evaluations("dense"), stopped.again.evaluations("dense")) == (nth // 2, 3 - nth // 2)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_of_training_ends_at_once(recipe, whole, tmp_path, signum):
    _, run = whole(1)
    places = run.places[0]
    number = random.Random(signum).choice([n for n, (phase, _) in enumerate(places) if phase == "evaluation"])
    stopped = stop_and_go_on(recipe, whole, tmp_path / "run", 1, number, signum)
    assert len(stopped.places[0]) == number + 1
    assert "What was finished is kept." in stopped.output


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(recipe, whole, tmp_path, rank):
    _, run = whole(2)
    second = [n for n, found in enumerate(run.places[rank]) if found == ("dense training", "before training_step")][1]
    stopped = stop_and_go_on(recipe, whole, tmp_path / "run", 2, second, signal.SIGINT, rank)
    assert "checkpoint-2." in stopped.output
    assert [places.count(("dense training", "before training_step")) for places in stopped.places] == [2, 2]
    assert stopped.again.steps("dense") == 1


@pytest.fixture
def half(recipe, whole, tmp_path):
    """A run that was killed in fine-tuning."""
    _, run = whole(1)
    number = number_of(run, "fine-tuned training", "before training_step", 3)
    recipe(tmp_path / "run", stop_at=number)
    return tmp_path / "run"


@pytest.mark.slow
def test_a_place_is_forced_and_one_that_cannot_be_is_refused(recipe, whole, half):
    reference, _ = whole(1)
    training = half / "stages" / "fine-tuned" / "training"
    (training / "checkpoint-9").mkdir()
    for place, why in (
        (training / "checkpoint-9", "has no complete.json"),
        (training / "checkpoint-8", "no such folder"),
        (half / "stages" / "dense" / "training" / "checkpoint-2", "the stage dense is finished"),
        (reference, "is no checkpoint of this run"),
    ):
        refused = recipe(half, "--resume_from_checkpoint", str(place))
        assert refused.statuses == [2]
        assert refused.output.count("error: ") == 1
        assert why in refused.output
    again = recipe(half, "--resume_from_checkpoint", str(training / "checkpoint-2"))
    assert again.statuses == [0], again.output[-3000:]
    assert "resumed_from=checkpoint-2" in again.output
    assert (half / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_stage_that_was_edited_is_refused_by_the_name_of_the_file(recipe, half):
    file = half / "stages" / "dense" / "model" / "model.safetensors"
    content = file.read_bytes()
    for changed in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(changed)
        refused = recipe(half)
        assert refused.statuses == [2]
        assert f"error: {file} is not as it was written" in refused.output
        assert "remove" in refused.output
    file.unlink()
    assert f"error: {file} is missing" in recipe(half).output
    file.write_bytes(content)
    assert recipe(half).statuses == [0]
