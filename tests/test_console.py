"""What is shown: bars in a terminal, lines in a file, one line a stage; levels of the log; ranks above 0."""

import io
import json
import logging
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from hf_mrpf import AttackConfig, MRPFConfig, evaluate_robustness, module_robustness_sensitivity, plan_pruning, progress
from hf_mrpf.allocation import meet_target
from hf_mrpf.console import LOGGER, announce, report_errors, say, show
from hf_mrpf.progress import ProgressLines, progress_bar, shows_progress
from hf_mrpf.stage_lines import pruned_before, stage_line, training_figures


@pytest.fixture(autouse=True)
def _levels_as_before():
    import datasets

    before = LOGGER.level, LOGGER.handlers, LOGGER.propagate
    theirs = transformers_logging.get_verbosity(), datasets.logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    LOGGER.setLevel(before[0])
    LOGGER.handlers, LOGGER.propagate = before[1:]
    transformers_logging.set_verbosity(theirs[0])
    datasets.logging.set_verbosity(theirs[1])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def in_terminal(monkeypatch) -> Terminal:
    """To be called in the test itself: pytest puts its own streams in place after the fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def small_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3, stride=3), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(16 * 4, 4),
    )  # fmt: skip


def test_in_a_log_file_a_bar_is_whole_lines_seldom(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar(100, "sensitivity", "module") as bar:
        assert isinstance(bar, ProgressLines)
        for _ in range(100):
            now[0] += 0.8
            bar.update()
    text = capsys.readouterr().err
    assert "\r" not in text
    first, *_, last = lines = text.splitlines()
    assert len(lines) == 3  # after 30 and 60 of 80 seconds, and at the end
    assert first == "sensitivity:  38% 38/100 [00:30<00:49,  1.25module/s]"
    assert last == "sensitivity: 100% 100/100 [01:19<00:00,  1.25module/s]"
    with progress_bar(5, "validation", "batch", leave=False) as bar:
        bar.update(5)
    with progress_bar(5, "off", "batch", shown=False) as bar:
        bar.update(5)
    assert capsys.readouterr().err == ""
    with progress_bar(None, "unknown", "image") as bar:
        bar.set_postfix({"loss": 1})
        bar.update(8)
    assert capsys.readouterr().err == "unknown: 8 [00:00, ?image/s, loss=1]\n"


def test_in_a_terminal_it_is_a_bar_with_rate_and_time_left(monkeypatch):
    terminal = in_terminal(monkeypatch)
    with progress_bar(4, "sensitivity", "module") as bar:
        bar.update(4)
    assert isinstance(bar, tqdm)
    assert "sensitivity: 100%" in terminal.getvalue()
    assert "\r" in terminal.getvalue()


def test_mrs_search_and_each_attack_show_how_far_they_are(monkeypatch):
    terminal = in_terminal(monkeypatch)
    net, images, labels = small_net(), torch.rand(12, 3, 10, 10), torch.arange(12) % 4
    attack = AttackConfig(eps=0.05, num_steps=1)
    module_robustness_sensitivity(net, [(images, labels)], attack, num_steps=1, progress=True)
    plan_pruning(net, images[:1], target=0.6, allocation="uniform", progress=True)
    evaluate_robustness(net, (images, labels), ("clean", "fgsm", "pgd20"), attack, batch_size=4, progress=True)
    shown = terminal.getvalue()
    for part in ("sensitivity: 100%", " 3/3 ", "pruning search: 100%", "candidate/s", "evaluation: 100%", " 36/36 "):
        assert part in shown, part
    assert "evaluation, fgsm:" in shown


def test_nothing_is_shown_unasked(monkeypatch):
    terminal = in_terminal(monkeypatch)
    net, images, labels = small_net(), torch.rand(4, 3, 10, 10), torch.arange(4)
    plan_pruning(net, images[:1], target=0.6, allocation="uniform")
    evaluate_robustness(net, (images, labels), ("clean",))
    assert terminal.getvalue() == ""
    main = SimpleNamespace(disable_tqdm=False, process_index=0)
    assert shows_progress(main)
    assert not shows_progress(SimpleNamespace(disable_tqdm=True, process_index=0))
    assert not shows_progress(SimpleNamespace(disable_tqdm=False, process_index=1))


@pytest.mark.parametrize("wanted", [10, 137, 500, 999])
def test_the_search_says_how_many_candidates_are_to_come(wanted):
    options = {"a": range(1, 40), "b": range(8, 41, 8)}
    measured, promised = [], []

    def size(widths):
        measured.append(widths)
        return widths["a"] * widths["b"]

    def widths_at(nominal):
        return {name: min(widths, key=lambda w: abs(w - 40 * nominal)) for name, widths in options.items()}

    widths = meet_target(size, options, widths_at, {"a": 1, "b": 0}, wanted, lowest=0.1, to_come=promised.append)
    assert 0 <= sum(promised) - len(measured) <= 1
    assert abs(size(widths) - wanted) <= 20


def fake(process_index=0, **changes):
    settings = {"log_level": "passive", "log_level_replica": "error", "process_index": process_index}
    settings |= {"world_size": 2, "device": "cpu", "seed": 1, "bf16": False, "fp16": False}
    return SimpleNamespace(**(settings | changes))


def test_stage_lines_are_shown_by_default_and_hidden_by_the_level_but_errors_and_results_never(capsys):
    for level, shown in (("passive", True), ("info", True), ("warning", False), ("error", False)):
        args = fake(log_level=level)
        announce(args)
        say(args, "[dense] epochs=1")
        show(args, "| the table |")
        out = capsys.readouterr().out
        assert ("[dense] epochs=1\n" in out) == shown
        assert ("world size 2" in out) == shown
        assert "| the table |\n" in out

    def refuse():
        raise ValueError("eps is 8")

    with pytest.raises(SystemExit):
        report_errors(refuse)
    assert capsys.readouterr().err == "error: eps is 8\n"


def test_the_level_is_that_of_transformers_and_datasets_too(capsys):
    import datasets

    announce(fake(log_level="error"))
    assert transformers_logging.get_verbosity() == datasets.logging.get_verbosity() == logging.ERROR
    announce(fake(log_level="info"))
    assert transformers_logging.get_verbosity() == datasets.logging.get_verbosity() == logging.INFO
    warning = logging.getLogger("hf_mrpf.callbacks")
    capsys.readouterr()
    warning.warning("robust overfitting")
    assert capsys.readouterr().out == "warning: robust overfitting\n"


def test_ranks_above_0_print_nothing_unless_they_are_asked(capsys, monkeypatch):
    args = fake(process_index=1)
    announce(args)
    say(args, "[dense] epochs=1")
    show(args, "| the table |")
    warnings.warn("a library's", stacklevel=1)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")
    announce(fake(process_index=1, log_level_replica="info"))
    assert capsys.readouterr().out.startswith("(process 1) world size 2")

    def refuse():
        raise ValueError("disk full")

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        report_errors(refuse)
    assert capsys.readouterr().err == "error on process 1: disk full\n"


def test_a_line_clears_an_open_bar_first(monkeypatch):
    terminal = in_terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdout", terminal)
    args = fake()
    announce(args)
    with progress_bar(4, "training", "step") as bar:
        bar.update()
        bar.refresh()
        say(args, "[dense] epochs=1")
    before, after = terminal.getvalue().split("[dense] epochs=1\n")
    assert before.endswith("\r")  # the bar's line was emptied
    assert "training:" in after


def test_replicas_and_bars_are_quiet_by_default(tmp_path):
    args = MRPFConfig(str(tmp_path), use_cpu=True)
    assert (args.log_level_replica, args.disable_tqdm) == ("error", False)
    assert MRPFConfig(str(tmp_path), use_cpu=True, log_level="error").disable_tqdm
    assert not MRPFConfig(str(tmp_path), use_cpu=True, log_level="error", disable_tqdm=False).disable_tqdm


def test_a_stage_is_one_line_of_pairs():
    best = {"epoch": 2.0, "eval_accuracy": 0.9, "eval_robust_accuracy": 0.45678}
    result = {
        "epochs": 3.0,
        "steps": 12,
        "seconds": 61.24,
        "resumed_from": None,
        "best": best,
        "start": "fresh weights",
    }
    result |= {"last": best | {"eval_robust_accuracy": 0.4}, "warnings": [{"kind": "robust"}]}
    figures = training_figures("trades", result, {"macs": 0.5, "params": 0.25})
    line = stage_line("fine-tuned", figures)
    assert line == (
        "[fine-tuned] objective=trades epochs=3 steps=12 seconds=61.24 macs=0.5 params=0.25 clean=0.9 robust=0.4568 "
        'best_epoch=2 last_robust=0.4 overfitting=robust start="fresh weights"'
    )
    json.dumps(figures)
    last = training_figures("trades", result | {"loaded": "last"})
    assert (last["robust"], last["last_robust"], last["best_epoch"]) == (0.4, 0.4, None)
    assert pruned_before({"figures": figures}) == {"macs": 0.5, "params": 0.25}
    assert pruned_before(None) == {}
    taken = training_figures("trades", {"epochs": 0, "start": "net"})
    assert stage_line("dense", taken, "taken as it is") == "[dense] taken as it is epochs=0 macs=1 params=1 start=net"
    assert (
        stage_line("a", {"text": 'say "so"', "empty": "", "flag": True}) == r'[a] text="say \"so\"" empty="" flag=True'
    )
