"""Signals: what is said at the end, what a second one does, and that a notebook keeps its own handlers."""

import os
import signal
import sys
import time

import pytest

import hf_mrpf.interruption as interruption
from hf_mrpf.interruption import Interrupted, own_command, repeatable_command, resumable, stopping_between_steps


@pytest.mark.parametrize("option", ["--hub_token", "--hub-token", "--hub_tok", "--hub_t", "--hub-to"])
@pytest.mark.parametrize("separate", [True, False])
def test_the_command_shows_no_spelling_of_the_token_and_does_not_start_again(monkeypatch, option, separate):
    given = [option, "SECRET WORDS"] if separate else [f"{option}=SECRET WORDS"]
    harmless = ["--output_dir", "outputs/hf_mrpf-run", "--include_num_input_tokens_seen", "all"]
    monkeypatch.setattr(sys, "argv", ["prune.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "prune.py", *given, *harmless, "--overwrite_output_dir"])
    shown = f"{option} '***'" if separate else f"'{option}=***'"
    assert own_command() == f"python prune.py {shown} {' '.join(harmless)}"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["/opt/bin/python3", "/opt/bin/accelerate", "launch", "--cpu"], "accelerate launch --cpu"),
        (["python", "-m", "accelerate.commands.launch", "--num_processes", "2"], "accelerate launch --num_processes 2"),
        (["/usr/bin/python", "/opt/bin/torchrun", "--nproc_per_node=2"], "torchrun --nproc_per_node=2"),
        (["bash"], "accelerate launch"),  # that is no launcher, and names no script
    ],
)
def test_the_command_of_a_card_has_the_options_of_the_launcher_and_no_path_of_its_program(monkeypatch, words, shown):
    ours = ["recipes/prune.py", "--hub_token", "SECRET", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", [*ours, "--overwrite_output_dir"])
    given = words if words == ["bash"] else [*words, *sys.argv]
    monkeypatch.setattr(interruption.Path, "read_text", lambda self, **_: "\0".join(given) + "\0")
    assert repeatable_command() == f"{shown} recipes/prune.py --hub_token '***' --seed 3"


def test_outside_of_training_a_signal_ends_at_once_with_a_message_and_the_old_handlers_are_back(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for signum in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(SystemExit) as end:
            resumable(lambda signum=signum: signal.raise_signal(signum))()
        assert end.value.code == 128 + signum
        message = capsys.readouterr().err
        assert f"stopped by {signal.Signals(signum).name}. What was finished is kept." in message
        assert own_command() in message
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_in_training_it_waits_an_echo_is_no_second_one_and_a_second_one_ends_at_once(monkeypatch):
    reached = []

    def main():
        with stopping_between_steps():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)  # passed on by a launcher
            reached.append("still running")
            monkeypatch.setattr(interruption, "_ECHO", 0.0)
            time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)
            reached.append("not reached")

    with pytest.raises(SystemExit) as end:
        resumable(main)()
    assert end.value.code == 130
    assert reached == ["still running"]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_worker_outlives_ctrl_c_and_can_be_ended(signum, status, capfd):
    def main():
        with stopping_between_steps():
            worker = os.fork()
            if worker == 0:
                signal.raise_signal(signum)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == status

    resumable(main)()
    assert "stopping" not in capfd.readouterr().err


def test_a_signal_after_the_last_step_is_not_lost():
    def main():
        with stopping_between_steps():
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        resumable(main)()
    assert end.value.code == 143


@pytest.fixture(autouse=True)
def _handled():
    """A shell that starts a process in the background has it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reached = []
    resumable(lambda: reached.append(signal.raise_signal(signal.SIGINT)))()
    assert reached == [None]


def test_without_a_recipe_nothing_changes():
    with pytest.raises(KeyboardInterrupt) as stop, stopping_between_steps():
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(stop.value, Interrupted)
