"""
Faults of long runs. Each row of `FAULTS` is tried by the tests it names; what happens is what they show.

Nothing that was finished before the fault is lost, and none ends in a traceback from inside a library.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import time
import types
from unittest.mock import patch

import process_group
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_mrpf import MRPFConfig, MRPFTrainer, ObjectiveOutput, load_image_data
from hf_mrpf.checkpoints import newest_complete
from hf_mrpf.console import report_errors
from hf_mrpf.faults import explain

FAULTS = {
    "disk full while saving": (
        "one message; the last complete checkpoint stays, and with room again the same command goes on from it",
        "test_faults.test_a_full_disk_is_one_message_and_the_run_goes_on_once_there_is_room",
    ),
    "output folder not writable": (
        "refused before anything is loaded, naming the folder",
        "test_run_folder.test_a_folder_that_cannot_be_written_to_is_refused_before_any_work",
    ),
    "broken image in the middle of the data": (
        "one message with split and row, before any training",
        "test_data.test_broken_images_are_named_by_their_row_of_the_split",
    ),
    "data loading worker killed": (
        "one message with its pid and what to lower; goes on from the checkpoint",
        "test_faults.test_a_killed_worker_is_one_message",
    ),
    "one process of several killed": (
        "the others end within a minute and say that a peer is gone",
        "test_faults.test_where_one_process_is_killed_the_other_ends_and_says_why",
    ),
    "out of memory at a batch": (
        "the message says the batch size and what to lower; auto_find_batch_size finds one that fits",
        "test_faults.test_out_of_memory_says_the_batch_size_and_what_to_lower",
    ),
    "NaN from bf16": (
        "training stops before the step, names the last finite checkpoint and advises float32",
        "test_faults.test_nan_from_bf16_stops_before_the_step_and_advises_float32",
    ),
    "clock moved back": (
        "checkpoints are ordered by step, so the newest is neither removed nor overlooked",
        "test_checkpoints.test_rotation_goes_by_step_and_spares_the_newest_and_the_best",
    ),
    "evaluation interrupted half-way": (
        "verdicts are kept batch by batch; what was attacked is not attacked again",
        "test_distributed.test_robust_evaluation_on_shares_gives_every_image_the_same_verdict_once",
    ),
    "checkpoint of a newer version": (
        "refused with the version to update to, or what else to do",
        "test_modeling.test_a_checkpoint_of_a_newer_version_is_refused_with_what_to_do",
    ),
    "files edited by hand": (
        "the file is named, with what to do",
        "test_run_folder.test_the_model_of_a_finished_stage_is_checked",
    ),
}

QUICK = {
    "eps": 0.1,
    "num_steps": 1,
    "per_device_train_batch_size": 8,
    "crop_padding": 0,
    "horizontal_flip": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 4,
}


@pytest.fixture(scope="module")
def data():
    return load_image_data(max_train_samples=96, max_eval_samples=40)


def wide_net() -> nn.Module:
    """0.4 MB of weights, and as much again in the optimizer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 128), nn.ReLU(), nn.Linear(128, 10))


def trainer_in(folder, data, **changes) -> MRPFTrainer:
    callbacks = changes.pop("callbacks", None)
    net = changes.pop("net", None) or wide_net()
    args = MRPFConfig(output_dir=str(folder), **(QUICK | changes))
    return MRPFTrainer(net, args, data.train, callbacks=callbacks)


def weights_of(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def told(function, capfd) -> str:
    """The one message that a recipe ends with where `function` is its main."""
    with pytest.raises(SystemExit) as end:
        report_errors(function)
    assert end.value.code == 2
    written = capfd.readouterr().err
    messages = [line for line in written.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, written
    assert "Traceback" not in written
    return messages[0]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and a function that gives it another size in kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4096k", "tmpfs", str(place)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone")

    def resize(kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(place)], check=True)

    yield place, resize
    subprocess.run(["umount", "-l", str(place)], check=True)


# Weights take 400 kB, and a whole checkpoint 810 kB: the disk ends in the weights, or in the optimizer's state.
@pytest.mark.parametrize("room", [1000, 1400])
def test_a_full_disk_is_one_message_and_the_run_goes_on_once_there_is_room(tmp_path, data, small_disk, capfd, room):
    place, resize = small_disk
    whole = trainer_in(tmp_path / "whole", data)
    whole.train()
    resize(room)
    message = told(lambda: trainer_in(place / "run", data).train(), capfd)
    assert message.startswith("error: The disk is full")
    assert "the same command goes on" in message
    assert newest_complete(place / "run", say=lambda line: None).name == "checkpoint-1"
    resize(8192)
    later = trainer_in(place / "run", data)
    later.train(resume_from_checkpoint=True)
    assert torch.equal(weights_of(later), weights_of(whole))


class KillWorkers(TrainerCallback):
    """Kills once checkpoint-2 is whole: the signal of a dead child would break off the writing of it too."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)


def test_a_killed_worker_is_one_message(tmp_path, data, capfd):
    workers = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1, "max_steps": 12}
    trainer = trainer_in(tmp_path, data, callbacks=[KillWorkers()], **workers)
    message = told(trainer.train, capfd)
    assert "DataLoader worker (pid" in message
    assert "Lower --dataloader_num_workers" in message
    # One batch more may have been waiting, and another step have been taken before the signal came.
    assert newest_complete(tmp_path).name in ("checkpoint-2", "checkpoint-3", "checkpoint-4")


def test_a_worker_is_named_also_where_its_connection_breaks_before_the_signal_comes(capfd):
    def hand_over():
        raise ConnectionResetError(104, "Connection reset by peer")

    def main(signalled: bool, module: str) -> None:
        def die(*_):
            raise RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed.")

        signal.signal(signal.SIGALRM, die)
        signal.setitimer(signal.ITIMER_REAL, 0.2 if signalled else 0)
        types.FunctionType(hand_over.__code__, {"__name__": module, "ConnectionResetError": ConnectionResetError})()

    loader = "torch.utils.data.dataloader"
    assert "DataLoader worker (pid 17) was killed" in told(lambda: main(True, loader), capfd)
    with patch("hf_mrpf.faults.SECONDS_FOR_THE_SIGNAL", 0.1):
        assert "DataLoader worker was killed" in told(lambda: main(False, loader), capfd)
    # A connection of anything else is not waited for.
    with patch("hf_mrpf.faults.time.sleep", side_effect=AssertionError):
        assert "Connection reset by peer" in told(lambda: main(False, "requests"), capfd)


def hungry(limit: int):
    """An objective that has memory for `limit` images; the text is that of torch on a GPU."""

    def objective(model, images, labels, attack, **kwargs):
        if len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        logits = model(images)
        return ObjectiveOutput(nn.functional.cross_entropy(logits, labels), logits)

    return objective


def test_out_of_memory_says_the_batch_size_and_what_to_lower(tmp_path, data, capfd):
    message = told(trainer_in(tmp_path / "no", data, objective=hungry(4)).train, capfd)
    assert "at a batch of 8 images" in message
    assert "Lower --per_device_train_batch_size and raise --gradient_accumulation_steps" in message
    fitting = trainer_in(tmp_path / "fits", data, objective=hungry(6), auto_find_batch_size=True)
    fitting.train()
    assert fitting.state.global_step == 4
    assert fitting.state.train_batch_size <= 6
    small = {"auto_find_batch_size": True, "per_device_train_batch_size": 1}
    none = trainer_in(tmp_path / "none", data, objective=hungry(0), **small)
    assert "Out of memory in training" in told(none.train, capfd)
    assert "Out of memory" in explain(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))


class Overflow(TrainerCallback):
    """Weights that are finite, and whose logits are not once they are rounded."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                for parameter in kwargs["model"].parameters():
                    parameter.fill_(3e38)


def test_nan_from_bf16_stops_before_the_step_and_advises_float32(tmp_path, data, capfd):
    trainer = trainer_in(tmp_path, data, bf16=True, callbacks=[Overflow()], objective="standard", save_steps=2)
    message = told(trainer.train, capfd)
    assert "The loss is nan at step 3" in message or "The loss is inf at step 3" in message
    assert "without --bf16" in message


def killed_in_step_two(folder, data):
    """Training in which rank 1 kills itself; what rank 0 says, and how long after."""

    class Die(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                if args.process_index == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                (folder / "killed").write_text(str(time.monotonic()))

    trainer = trainer_in(folder, data, callbacks=[Die()])
    with open(folder / f"err{trainer.args.process_index}", "w") as file, contextlib.redirect_stderr(file):
        try:
            report_errors(trainer.train)
        except SystemExit as end:
            return end.code, time.monotonic() - float((folder / "killed").read_text())
    return 0, 0.0


def test_where_one_process_is_killed_the_other_ends_and_says_why(tmp_path, data):
    results = process_group.outcomes(2, killed_in_step_two, tmp_path, data)
    assert results[1] is None
    status, seconds = results[0]
    assert status == 2
    assert seconds < 60
    assert "error: Another process of this run has ended" in (tmp_path / "err0").read_text()
    assert newest_complete(tmp_path).name == "checkpoint-2"


def test_what_nobody_can_put_right_stays_a_traceback():
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert explain(KeyError("x")) is None
    with pytest.raises(RuntimeError, match="mat1"):
        report_errors(lambda: (_ for _ in ()).throw(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


def test_every_fault_has_a_test_that_exists(capsys):
    for _, where in FAULTS.values():
        file, function = where.split(".")
        assert callable(getattr(importlib.import_module(file), function, None)), where
    with capsys.disabled():
        print(f"\n{len(FAULTS)} kinds of faults tried")
