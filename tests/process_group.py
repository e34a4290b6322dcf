"""
Runs a function on processes that share a group, without another import of anything: CPUs by gloo, or GPUs by NCCL.

They are forked from a server that has imported, and nothing else: once a process has run a backward pass on more than
the CPU, as tests of meta tensors do, autograd refuses to work in what is forked from it.
"""

import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PRELOADED = ["hf_mrpf.trainer", "timm", "torch_pruning", "transformers.models.auto.modeling_auto"]


def on_processes(
    count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240, backend: str = "gloo"
) -> list[Any]:
    """
    What `function(*arguments)` returns on each of `count` forked processes, by rank; an error of one is raised.

    One process has no group. Each computes on `PartialState().device`: the CPU, or with NCCL the GPU of its rank.
    """
    results = _results(count, function, arguments, timeout, backend)
    errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(results) if error]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [value for _, value in results]


def outcomes(count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
    """As [`on_processes`], with None for a process that was killed or failed."""
    return [value for _, value in _results(count, function, arguments, timeout, "gloo")]


def _results(
    count: int, function: Callable[..., Any], arguments: tuple, timeout: float, backend: str
) -> list[tuple[str, Any]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        files = [Path(folder) / str(rank) for rank in range(count)]
        # As bytes: handed over as they are, tensors would share their memory with this process and the other ones.
        work = pickle.dumps((function, arguments))
        processes = [
            context.Process(target=_run, args=(rank, count, port, file, work, backend))
            for rank, file in enumerate(files)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
            process.kill()
        return [pickle.loads(file.read_bytes()) if file.exists() else ("no result", None) for file in files]


def _run(rank: int, count: int, port: int, file: Path, work: bytes, backend: str) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    # The state of the parent, a single process, came along with the fork.
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    if count > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # a trainer that sees two GPUs uses both
    if backend == "gloo":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    # One process and two are compared to more digits than TF32 has.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    try:
        function, arguments = pickle.loads(work)
        PartialState(cpu=backend == "gloo")
        outcome = ("", function(*arguments))
    except BaseException:
        outcome = (traceback.format_exc(), None)
    file.write_bytes(pickle.dumps(outcome))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(0)
