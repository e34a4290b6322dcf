"""How many processes a recipe was started as: wrong launches are refused, accelerate's configs give the right ones."""

import json
import os
import runpy
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config.config_args import load_config_from_file

from hf_mrpf import console
from hf_mrpf.console import report_errors
from hf_mrpf.launch import LaunchError, check_world_size, is_first

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "recipes" / "accelerate"
# What accelerate 1.15 and torchrun set for the first process of each launch in the table of launch.py.
SIMPLE = {"ACCELERATE_MIXED_PRECISION": "no"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
RANKED = MEETING | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "found", "expected", "message"),
    [
        ({}, 1, None, None),
        ({}, 1, 1, None),
        (SIMPLE, 1, None, None),
        (MEETING, 1, None, None),  # a cluster's own variables, without accelerate
        (RANKED, 2, None, None),
        (RANKED | SIMPLE, 2, 2, None),
        # accelerate launch --cpu --num_processes 2, a MULTI_CPU config, or --num_processes 2 alone
        (SIMPLE | MEETING, 1, None, "asked for several processes and started one"),
        (SIMPLE | MEETING, 1, 2, "world size is 1, and --expected_world_size 2"),
        (SIMPLE | MEETING, 1, 1, None),
        # accelerate launch --multi_gpu and torchrun, without a GPU and without a request for the CPU
        (RANKED | SIMPLE, 1, None, "2 processes were started and each is alone"),
        (RANKED, 1, None, "2 processes were started and each is alone"),
        (RANKED, 1, 1, "2 processes were started and each is alone"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, 1, None, "4 processes were started"),
        (RANKED, 2, 3, "world size is 2, and --expected_world_size 3"),
        ({}, 1, 0, "--expected_world_size 0 is no number of processes"),
    ],
)
def test_a_launch_is_what_was_meant_or_it_is_refused(environment, found, expected, message):
    if message is None:
        check_world_size(found, expected, environment)
        return
    with pytest.raises(LaunchError, match=message) as refusal:
        check_world_size(found, expected, environment)
    assert "cpu_2proc.yaml" in str(refusal.value) or expected == 0


def test_the_first_process_alone_says_what_all_refuse(monkeypatch, capsys):
    naps = []
    monkeypatch.setattr(console.time, "sleep", naps.append)

    def refuse():
        raise LaunchError("wrong launch")

    for rank, said in (("0", "error: wrong launch\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            report_errors(refuse)
        assert stop.value.code == 2
        assert capsys.readouterr().err == said
    assert len(naps) == 1  # the others stay until the launcher ends them
    assert is_first({}) and is_first({"RANK": "0"}) and not is_first({"PMI_RANK": "1"})

    def fail():
        raise ValueError("of this process only")

    with pytest.raises(SystemExit):
        report_errors(fail)
    assert "of this process only" in capsys.readouterr().err


def parsed(*options: str):
    """The arguments as `accelerate launch` goes on with them."""
    parser = accelerate_launch.launch_command_parser()
    arguments, _, _ = accelerate_launch._validate_launch_command(parser.parse_args([*options, "recipe.py"]))
    return arguments


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("cpu_2proc", (), {"multi_gpu": True, "num_processes": 2, "num_machines": 1, "use_cpu": True}),
        ("single_gpu", (), {"multi_gpu": False, "num_processes": 1, "gpu_ids": "0", "use_cpu": False}),
        ("single_gpu", ("--gpu_ids", "3"), {"multi_gpu": False, "num_processes": 1, "gpu_ids": "3"}),
        ("multi_gpu", (), {"multi_gpu": True, "num_processes": 2, "num_machines": 1, "gpu_ids": "all"}),
        ("multi_gpu", ("--num_processes", "4"), {"multi_gpu": True, "num_processes": 4, "num_machines": 1}),
        (
            "multi_node",
            (),
            {"multi_gpu": True, "num_processes": 16, "num_machines": 2, "machine_rank": 0, "rdzv_backend": "static"},
        ),
        (
            "multi_node",
            ("--machine_rank", "1", "--main_process_ip", "10.0.0.1"),
            {"machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29500},
        ),
    ],
)
def test_accelerate_reads_the_configs_as_they_are_meant(name, options, expected):
    file = str(CONFIGS / f"{name}.yaml")
    load_config_from_file(file)  # refuses unknown keys
    arguments = parsed("--config_file", file, *options)
    assert {key: getattr(arguments, key) for key in expected} == expected
    assert arguments.mixed_precision == "no"
    assert not (arguments.cpu or arguments.use_deepspeed or arguments.use_fsdp or arguments.tpu)


def test_every_config_is_tested():
    assert {file.stem for file in CONFIGS.glob("*")} == {"cpu_2proc", "single_gpu", "multi_gpu", "multi_node"}


@pytest.fixture
def evaluate():
    return runpy.run_path(str(REPOSITORY / "recipes" / "evaluate.py"), run_name="recipe")


def test_evaluation_is_on_the_device_of_the_launcher_or_the_one_that_is_named(evaluate):
    class State:
        device = torch.device("cuda", 1)

    own = evaluate["own_device"]
    assert own(State, None) == own(State, "cuda") == torch.device("cuda", 1)
    assert own(State, "cuda:0") == torch.device("cuda", 0)
    assert own(State, "cpu") == torch.device("cpu")
    State.device = torch.device("cpu", 0)
    assert own(State, None) == own(State, "cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device 'gpu' is no device; give cpu, cuda or mps"):
        own(State, "gpu")


# ---- For real -----------------------------------------------------------------------------------------------------

NETWORK = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_type": "deep", "stem_width": 4}
TINY = [
    *("--max_train_samples", "64", "--max_eval_samples", "20", "--num_train_epochs", "1", "--num_steps", "1"),
    *("--eval_num_steps", "1", "--optim", "adam", "--disable_tqdm", "True"),
]
PRUNING = [
    *("--calibration_sets", "2", "--calibration_set_size", "16", "--sensitivity_steps", "1"),
    *("--recalibration_samples", "32", "--pruning_rounds", "2", "--recovery_epochs", "1"),
]


def launch(launcher: list[str], recipe: str, *options: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    command = [sys.executable, "-m", *launcher, f"recipes/{recipe}.py", *options]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)


ACCELERATE = ["accelerate.commands.launch"]
TWO_ON_THE_CPU = [*ACCELERATE, "--config_file", str(CONFIGS / "cpu_2proc.yaml"), "--main_process_port", "0"]


def errors(result: subprocess.CompletedProcess) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_processes_that_are_alone_stop_with_one_message_and_write_nothing(tmp_path):
    alone = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    # The recipe that imports least; it stops before it looks for the model.
    result = launch(alone, "evaluate", "no/model", "--output", str(tmp_path / "report.json"))
    assert result.returncode != 0
    (error,) = errors(result)
    assert "2 processes were started and each is alone" in error
    assert not any(tmp_path.iterdir())


MULTI_CPU = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options", "variables", "found"),
    [
        ([*ACCELERATE, "--cpu", "--num_processes", "2"], (), {}, "asked for several processes and started one"),
        ([*ACCELERATE, "--config_file", "MULTI_CPU"], (), {}, "asked for several processes and started one"),
        ([*ACCELERATE, "--num_processes", "2"], (), {}, "asked for several processes and started one"),
        (TORCHRUN, (), {}, "2 processes were started and each is alone"),
        (
            [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
            ("--use_cpu",),
            {},
            "The world size is 2",
        ),
        ([*ACCELERATE, "--cpu", "-m", *TORCHRUN], (), {}, "The world size is 2"),
        (TORCHRUN, (), {"ACCELERATE_USE_CPU": "true"}, "The world size is 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_each_launch_starts(tmp_path, launcher, options, variables, found):
    """Three processes are expected of a launch of two, so that each stops before any work and says what it is."""
    if "MULTI_CPU" in launcher:
        (tmp_path / "multi_cpu.yaml").write_text(MULTI_CPU)
        launcher = [str(tmp_path / "multi_cpu.yaml") if part == "MULTI_CPU" else part for part in launcher]
    if "The world size" in found:
        options = (*options, "--expected_world_size", "3")
    result = launch(launcher, "train", "--output_dir", str(tmp_path / "run"), *options, **variables)
    assert result.returncode != 0
    (error,) = errors(result)
    assert found in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_machines_are_one_run(tmp_path):
    """Both are this one, by the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    node = [*ACCELERATE, "--config_file", str(CONFIGS / "multi_node.yaml"), "--num_processes", "2"]
    node += ["--main_process_port", port, "--machine_rank"]
    options = ("--output_dir", str(tmp_path / "run"), "--use_cpu", "--expected_world_size", "3")
    with ThreadPoolExecutor(2) as pool:
        started = [pool.submit(launch, [*node, rank], "train", *options) for rank in ("0", "1")]
        results = [one.result() for one in started]
    assert all(result.returncode != 0 for result in results)
    (error,) = [line for result in results for line in errors(result)]
    assert "The world size is 2" in error


@pytest.mark.slow
def test_two_processes_train_prune_and_evaluate(tmp_path):
    two = ("--use_cpu", "--expected_world_size", "2")
    dense, pruned, file = tmp_path / "dense", tmp_path / "pruned", tmp_path / "report.json"
    small = ("--backbone_kwargs", json.dumps(NETWORK))
    result = launch(TWO_ON_THE_CPU, "train", "--output_dir", str(dense), *TINY, *small, *two)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("world size 2, device cpu") == result.stdout.count("[evaluation] ") == 1

    start = ("--model_name_or_path", str(dense))
    result = launch(TWO_ON_THE_CPU, "prune", "--output_dir", str(pruned), *start, *TINY, *PRUNING, *two)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "[dense] taken as it is" in result.stdout
    assert result.stdout.count("[pruned-1] allocation=") == result.stdout.count("[pruned] allocation=") == 1

    options = ("--max_eval_samples", "20", "--attacks", "clean", "fgsm", "--device", "cpu", *two[1:])
    result = launch(TWO_ON_THE_CPU, "evaluate", str(pruned), "--output", str(file), *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("world size 2, device cpu") == result.stdout.count("report in") == 1
    own = json.loads((pruned / "robustness_report.json").read_text())
    assert json.loads(file.read_text())["verdicts"]["fgsm"] == own["verdicts"]["fgsm"]
