"""A run that is killed anywhere goes on with the same command, and ends with the same weights, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NETWORK = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_type": "deep", "stem_width": 8}
# Two steps an epoch on one process and one on two; the seventh step, in mid-epoch, is the last.
TINY = [
    *("--backbone_kwargs", json.dumps(NETWORK), "--max_train_samples", "64", "--max_eval_samples", "24"),
    *("--base_epochs", "3", "--num_train_epochs", "2", "--control_epochs", "0", "--num_steps", "1"),
    *("--calibration_sets", "2", "--calibration_set_size", "16", "--sensitivity_steps", "1", "--eval_num_steps", "1"),
    *("--recalibration_samples", "32", "--disable_tqdm", "True", "--use_cpu"),
]
STAGES = ("dense", "pruned", "fine-tuned")
PHASES = (
    "dense training",
    "MRS",
    "planning",
    "pruning",
    "fine-tuned training",
    "evaluation",
    "checkpoint",
    "stage result",
    "publishing",
    "between stages",
)


@dataclass
class Run:
    """What one start of the recipe did."""

    statuses: list[int]
    places: list[list[tuple[str, str]]]  # by rank: phase and place, in order
    output: str

    def phases(self) -> set[str]:
        return {phase for phase, _ in self.places[0]}

    def steps(self, stage: str) -> int:
        return self.places[0].count((f"{stage} training", "before training_step"))


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
            assert set(PHASES) <= run.phases()
            made[world_size] = folder, run
        return made[world_size]

    return get


def chosen_places(run: Run, phases, count: int, seed: int) -> list[tuple[int, int]]:
    """Rank and number of `count` places: one in each of `phases`, the others anywhere, on any process."""
    generator = random.Random(seed)
    chosen = [
        (0, generator.choice([number for number, (found, _) in enumerate(run.places[0]) if found == phase]))
        for phase in phases
    ]
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
    assert set(killed.statuses) == {-signal.SIGKILL}, f"{name}\n{killed.output[-3000:]}"
    assert killed.places[rank] == uninterrupted.places[rank][: number + 1], name
    done = finished_stages(folder)
    scored = (folder / "stages" / "pruned" / "sensitivity.json").exists()
    again = recipe(folder, world_size=world_size)
    assert again.statuses == [0] * world_size, f"{name}\n{again.output[-3000:]}"
    for stage in done:
        assert f"[{stage}] kept from before" in again.output, name
        assert again.steps(stage) == 0, name
    if scored:
        assert "MRS" not in again.phases(), name
    if "pruned" in done:
        assert not {"planning", "pruning"} & again.phases(), name
    for file in ("model.safetensors", "pruning_plan.json", "config.json"):
        assert (folder / file).read_bytes() == (reference / file).read_bytes(), f"{name}: {file} differs"
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}, name
    assert not list((folder / "stages").rglob("checkpoint-*")), name
    return name


def test_a_kill_in_training_and_in_the_middle_of_publishing(recipe, whole, tmp_path):
    _, run = whole(1)
    for phase in ("dense training", "publishing"):
        (rank, number), *_ = chosen_places(run, [phase], 1, seed=7)
        print("killed in", kill_and_go_on(recipe, whole, tmp_path / phase, 1, rank, number))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_kills_anywhere(recipe, whole, tmp_path, world_size, capsys):
    _, run = whole(world_size)
    places = chosen_places(run, PHASES, count=14, seed=20241 + world_size)
    done = []
    for index, (rank, number) in enumerate(places):
        done.append(kill_and_go_on(recipe, whole, tmp_path / str(index), world_size, rank, number))
        with capsys.disabled():
            print(f"\nkilled in {done[-1]}", end="", flush=True)
    with capsys.disabled():
        counts = Counter(name.split(":")[0] for name in done)
        print(f"\n{len(done)} kills on {world_size} process(es), each gone on with to the same bits: {dict(counts)}")
    assert len(done) >= 12
