"""
How many processes a run was started as: launches that silently start one, or several unrelated ones, are refused.

What launchers make of two processes on a machine without GPU (accelerate 1.15, tried with the recipes):

| launch | processes | world size of each |
| --- | --- | --- |
| `accelerate launch --cpu --num_processes 2 recipe` | 1 | 1 |
| `accelerate launch --config_file` with `MULTI_CPU` | 1 | 1 |
| `accelerate launch --num_processes 2 recipe` | 1 | 1 |
| `accelerate launch --multi_gpu --num_processes 2 recipe` | 2 | 1: unrelated runs |
| `torchrun --nproc_per_node 2 recipe` | 2 | 1: unrelated runs |
| `accelerate launch --multi_gpu --num_processes 2 recipe --use_cpu` | 2 | 2 |
| `accelerate launch --config_file recipes/accelerate/cpu_2proc.yaml recipe --use_cpu` | 2 | 2 |
| `accelerate launch --cpu -m torch.distributed.run --nproc_per_node 2 recipe` | 2 | 2 |
| `ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 recipe` | 2 | 2 |
"""

import os
from collections.abc import Mapping

# Of torchrun and accelerate, and of three kinds of MPI.
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
ON_THE_CPU = (
    "Two processes on the CPU: accelerate launch --config_file recipes/accelerate/cpu_2proc.yaml RECIPE --use_cpu "
    "(recipes/evaluate.py: --device cpu). Several GPUs: accelerate launch --config_file "
    "recipes/accelerate/multi_gpu.yaml --num_processes N RECIPE."
)


class LaunchError(ValueError):
    """A launch that all of its processes refuse alike, so that one of them is enough to say so."""


def check_world_size(found: int, expected: int | None = None, environment: Mapping[str, str] | None = None) -> None:
    """
    Refuses a run that is not what was launched.

    Args:
        found (`int`):
            World size of this process.
        expected (`int`, *optional*):
            The number of processes that was meant.
        environment (`Mapping[str, str]`, *optional*):
            Variables that launchers set; those of this process if not given.

    Raises:
        LaunchError: where `found` is not `expected`; where several processes were started and this one is alone; where
            accelerate was asked for several processes and started one, unless one is what is expected.
    """
    environment = os.environ if environment is None else environment
    if expected is not None and expected < 1:
        raise LaunchError(f"--expected_world_size {expected} is no number of processes; it must be at least 1.")
    started = max(_numbers(environment, COUNTS), default=1)
    if found == 1 and started > 1:
        raise LaunchError(
            f"{started} processes were started and each is alone (world size 1): they would be {started} unrelated "
            f"runs on one folder, as where CPU processes are launched like those of GPUs. {ON_THE_CPU}"
        )
    # Only for several processes does accelerate say where they meet; with one of them it gives no rank.
    lone = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment
    lone = lone and not _numbers(environment, RANKS)
    if found == 1 and expected is None and lone:
        raise LaunchError(
            "accelerate was asked for several processes and started one (world size 1), as it does for --cpu "
            "--num_processes, for a MULTI_CPU config, and for several processes without --multi_gpu. "
            f"{ON_THE_CPU} To go on with one process: --expected_world_size 1."
        )
    if expected is not None and found != expected:
        raise LaunchError(
            f"The world size is {found}, and --expected_world_size {expected} was asked for. {ON_THE_CPU} "
            "Several machines: recipes/accelerate/multi_node.yaml, on each with its own --machine_rank."
        )


def is_first(environment: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher calls this process the first one; so it is without a launcher."""
    return not any(_numbers(os.environ if environment is None else environment, RANKS))


def _numbers(environment: Mapping[str, str], names: tuple[str, ...]) -> list[int]:
    return [int(environment[name]) for name in names if environment.get(name, "").isdecimal()]
