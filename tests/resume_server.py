"""
Runs recipes/prune.py in forked processes that die, or get a signal, at a chosen place; started by test_resume.py.

Everything is imported and read once. A request is a line of JSON on the standard input, and its answer a line on the
standard output. Every place that a run passes is counted, and written down with the phase it lies in: as a run is
deterministic, the n-th place of one run is the n-th place of the next.
"""

import contextlib
import functools
import gc
import io
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
import safetensors.torch
import timm  # noqa: F401
import torch
import torch_pruning  # noqa: F401
import transformers.modeling_utils

import hf_mrpf.cli
import hf_mrpf.data
import hf_mrpf.efficiency
import hf_mrpf.evaluation
import hf_mrpf.publishing
import hf_mrpf.report
import hf_mrpf.run_folder
import hf_mrpf.stages
import hf_mrpf.starting_point
import hf_mrpf.trainer

SUBSET = {"max_train_samples": 64, "max_eval_samples": 24}
RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "prune.py"


class Places:
    """Counts the places that this process passes, and dies or gets a signal at the chosen one."""

    def __init__(self, log: str, stop_at: int | None, signum: int):
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self.stop_at, self.signum = stop_at, signum
        self.count = 0
        self.phases = ["between stages"]

    def passed(self, place: str, path: str | os.PathLike = "") -> None:
        phase = "writing the result" if Path(path).parts[-3:-1] == ("stages", "result") else self.phases[-1]
        os.write(self.log, f"{phase}\t{place}\n".encode())
        self.count += 1
        if self.count - 1 == self.stop_at:
            os.kill(os.getpid(), self.signum)

    @contextlib.contextmanager
    def phase(self, name: str):
        self.phases.append(name)
        self.passed("begins")
        yield
        self.passed("ends")
        self.phases.pop()

    def watch(self, owner, name: str, phase) -> None:
        """Makes a function, wherever it is called from, a phase of its own; `phase` may depend on its arguments."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args, **kwargs):
            with self.phase(phase(*args) if callable(phase) else phase):
                return original(*args, **kwargs)

        setattr(owner, name, watched)

    def mark(self, owner, name: str) -> None:
        """A place before and after each call."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def marked(*args, **kwargs):
            self.passed(f"before {name}")
            result = original(*args, **kwargs)
            self.passed(f"after {name}")
            return result

        setattr(owner, name, marked)


def write_in_two_parts(places: Places, content: bytes, path) -> None:
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        places.passed(f"half of {Path(path).name}", path)
        file.write(content[len(content) // 2 :])


def watch_everything(places: Places) -> None:
    places.watch(hf_mrpf.stages, "train", lambda run, stage, *rest: f"{stage} training")
    places.watch(hf_mrpf.stages, "finish", lambda run, stage, *rest: "stage result")
    places.watch(hf_mrpf.trainer.MRPFTrainer, "_save_checkpoint", "checkpoint")
    places.watch(hf_mrpf.trainer, "module_robustness_sensitivity", "MRS")
    places.watch(hf_mrpf.trainer, "plan_pruning", "planning")
    places.watch(hf_mrpf.trainer.MRPFTrainer, "prune", "pruning")
    for name in ("prune", "repair", "recalibrate_batchnorm"):
        places.watch(hf_mrpf.trainer, name, "pruning")
    places.watch(hf_mrpf.evaluation, "evaluate_robustness", "evaluation")
    places.watch(hf_mrpf.run_folder.RunFolder, "publish", "publishing")
    for name in ("training_step", "evaluate"):
        places.mark(hf_mrpf.trainer.MRPFTrainer, name)
    for owner, name in ((torch.autograd, "grad"), (os, "replace"), (os, "fsync")):
        places.mark(owner, name)

    torch_save, write_text, rmtree = torch.save, Path.write_text, shutil.rmtree

    def save(content, file, *args, **kwargs):
        buffer = io.BytesIO()
        torch_save(content, buffer, *args, **kwargs)
        write_in_two_parts(places, buffer.getvalue(), file)

    def save_file(tensors, filename, metadata=None):
        write_in_two_parts(places, safetensors.torch.save(tensors, metadata), filename)

    def text(path, content, *args, **kwargs):
        if path.name != "run.lock":
            write_text(path, content[: len(content) // 2], *args, **kwargs)
            places.passed(f"half of {path.name}", path)
        return write_text(path, content, *args, **kwargs)

    def remove(path, *args, **kwargs):
        files = sorted(file for file in Path(path).rglob("*") if file.is_file()) if os.path.isdir(path) else []
        for file in files[: len(files) // 2]:
            file.unlink()
        if files:
            places.passed(f"half of {Path(path).name} removed")
        rmtree(path, *args, **kwargs)

    torch.save, Path.write_text, shutil.rmtree = save, text, remove
    transformers.modeling_utils.safe_save_file = save_file


def cheapen() -> None:
    """What takes long and is of no interest here: read once, or not measured."""
    hf_mrpf.data.load_image_data = functools.cache(hf_mrpf.data.load_image_data)
    versions = functools.cache(hf_mrpf.report.package_versions)
    for name, module in list(sys.modules.items()):
        if name.startswith("hf_mrpf.") and hasattr(module, "package_versions"):
            module.package_versions = versions
    hf_mrpf.efficiency.measure_latency = lambda models, *rest: dict.fromkeys(models, 0.001)


def run(request: dict, rank: int, port: int) -> None:
    """The forked process: the recipe, as a user starts it."""
    output = os.open(f"{request['log']}.out{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.setpgid(0, 0)
    signal.alarm(request["timeout"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started all in the background
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if request["world_size"] > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["world_size"], "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    stop_at = request["stop_at"] if rank == request["stopped_rank"] else None
    watch_everything(Places(f"{request['log']}.places{rank}", stop_at, request["signum"]))
    sys.argv = [str(RECIPE), *request["options"]]
    status = 0
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(request: dict) -> list[int]:
    """Exit statuses by rank, -9 for a process that was killed; where one is killed the others are killed with it."""
    port, ranks = free_port(), {}
    for rank in range(request["world_size"]):
        pid = os.fork()
        if pid == 0:
            run(request, rank, port)
        ranks[pid] = rank
    statuses = {}
    while len(statuses) < len(ranks):
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if statuses[pid] < 0:
            for other in ranks.keys() - statuses.keys():
                os.kill(other, signal.SIGKILL)
    return [statuses[pid] for pid in ranks]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing else may come between the answers
    torch.set_num_threads(1)  # threads that had run would not be there in a forked process
    cheapen()
    runpy.run_path(str(RECIPE), run_name="recipe")
    hf_mrpf.starting_point.load_data(hf_mrpf.cli.DataArguments(**SUBSET), None)
    gc.collect()
    gc.freeze()  # the collections of every child would look at all of it again
    print("ready", file=answers)
    for line in sys.stdin:
        start = time.monotonic()
        statuses = serve(json.loads(line))
        print(json.dumps({"statuses": statuses, "seconds": time.monotonic() - start}), file=answers)


if __name__ == "__main__":
    main()
