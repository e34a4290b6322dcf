"""The benchmark on CIFAR-10: its cells, its clock, and that it goes on where it was, with stand-ins for the recipes."""

import json
import sys

import gpu_cifar10
import pytest
from gpu_cifar10 import Cell, Clock, OutOfTime, cells, keep, main, parse_arguments, settings, trained_by

from hf_mrpf import PrunedForImageClassification

SLOW = """
import signal, sys, time
def stop(*given):
    open(sys.argv[1], "a").write("saved\\n")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1], "a").write("started\\n")
time.sleep(60)
"""


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    def parse(*options):
        monkeypatch.setattr(sys, "argv", ["gpu_cifar10.py", "--dataset", "digits", "--work", str(tmp_path), *options])
        return parse_arguments()

    return parse


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a script in the place of the recipes."""
    monkeypatch.setattr(gpu_cifar10, "RECIPES", tmp_path)
    monkeypatch.setattr(gpu_cifar10, "GRACE", 6.0)
    monkeypatch.setattr(gpu_cifar10, "LEAST", 0.1)
    return lambda name, text: (tmp_path / name).write_text(text)


def test_dense_comes_first_then_the_primary_cell_in_pairs_then_the_others(arguments):
    names = [cell.name for cell in cells(arguments("--seeds", "2"))]
    assert names[:4] == ["dense-resnet18", *(f"resnet18-macs0.5-{way}" for way in ("mrs-0", "uniform-0", "mrs-1"))]
    assert names[11:13] == ["resnet18-macs0.25-mrs-0", "resnet18-macs0.25-uniform-0"]
    assert [name for name in names if "params" in name and name.endswith("mrs-1")] == [
        f"resnet18-params{kept}-mrs-1" for kept in (0.5, 0.25, 0.1)
    ]
    assert names[-17] == "dense-mobilevit_xs" and len(names) == len(set(names)) == 2 + 2 * (5 + 5 * 2) + 6 * 2
    assert names[-12:-10] == ["resnet18-params0.5-damage-0", "resnet18-params0.5-damage-1"]


def test_a_recipe_that_takes_too_long_saves_and_the_next_call_goes_on(tmp_path, recipe):
    recipe("train.py", SLOW)
    folder, told = tmp_path / "cell", tmp_path / "told"
    with pytest.raises(OutOfTime):
        Clock((6.0 + 1.5) / 60).run(folder, "train.py", [told])
    assert told.read_text() == "started\nsaved\n"
    spent = json.loads((folder / "seconds.json").read_text())["train.py"]
    recipe(
        "train.py", "import time; time.sleep(0.3); print('done'); open(__import__('sys').argv[1], 'a').write('went on')"
    )
    assert Clock(1).run(folder, "train.py", [told]) == "done\n"
    assert told.read_text().endswith("went on")
    assert json.loads((folder / "seconds.json").read_text())["train.py"] > spent > 1
    with pytest.raises(OutOfTime):
        Clock(0.1).run(tmp_path / "none", "train.py", [told])
    assert not (tmp_path / "none").exists(), "nothing is begun without time"


def test_a_recipe_that_fails_says_why(tmp_path, recipe):
    recipe("prune.py", "raise SystemExit('error: target 0.01 cannot be met')")
    with pytest.raises(RuntimeError, match=r"prune.py ended with status 1:\nerror: target 0.01 cannot be met"):
        Clock(1).run(tmp_path / "cell", "prune.py", [])


def test_a_call_does_what_is_left_and_writes_a_line_a_cell(arguments, monkeypatch, capsys):
    args, done = arguments("--primary_seeds", "1"), []

    def finished(cell, clock, args):
        if len(done) == 3:
            raise OutOfTime
        done.append(cell.name)
        (args.scratch / cell.name).mkdir(parents=True)
        return {"cell": cell.name, "settings": settings(args, cell), "accuracy": dict.fromkeys(args.attacks, 0.5)}

    monkeypatch.setattr(gpu_cifar10, "finished", finished)
    main()
    assert "the time is over" in capsys.readouterr().out
    first, done = done, []
    main()
    every = [cell.name for cell in cells(args)]
    assert first + done == every[:6]
    assert [json.loads(line)["cell"] for line in args.results.read_text().splitlines()] == every[:6]
    assert not list(args.scratch.iterdir()), "what a finished cell needed is gone"
    arguments("--primary_seeds", "1", "--list")
    capsys.readouterr()
    main()
    out = capsys.readouterr().out
    assert out.count("| done |") == 6
    assert (len(every), out.count("| left |")) == (20, 14)
    args, done = arguments("--primary_seeds", "1", "--epochs", "3"), []
    main()
    # The dense model knows nothing of fine-tuning; lines with other settings are other cells'.
    assert done == every[1:4]


def test_a_dense_model_is_kept_in_small_files_and_not_taken_for_another(arguments, tmp_path, monkeypatch):
    args = arguments()
    args.work.mkdir(exist_ok=True)
    scratch = args.scratch / "dense-resnet18"
    model = PrunedForImageClassification.from_backbone(
        "timm/resnet18", num_labels=10, image_size=16, small_images=True, layers=(1, 1, 1, 1), channels=(32, 64, 64, 64)
    )
    model.save_pretrained(scratch / "run")
    (scratch / "seconds.json").write_text('{"train.py": 3.0}')
    cell, clock = Cell("resnet18", "macs", 0.5, "mrs", 0), None
    with pytest.raises(ValueError, match="dense-resnet18 is not there, and cells of resnet18 are pruned from it"):
        gpu_cifar10.made(cell, clock, args)
    keep(scratch, args.work / "dense-resnet18", trained_by(args))
    assert gpu_cifar10.made(Cell("resnet18"), clock, args) == (args.work / "dense-resnet18", {})
    assert gpu_cifar10.dense_model("resnet18", arguments("--num_samples", "7", "--epochs", "2"))[1]
    files = list((args.work / "dense-resnet18").glob("*.safetensors"))
    assert files and all(file.stat().st_size < 15.1e6 for file in files)
    with pytest.raises(ValueError, match=r"trained with other settings \(dense_epochs\); give another --work"):
        gpu_cifar10.made(cell, clock, arguments("--dense_epochs", "5"))


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--dataset", "nowhere"], "--dataset nowhere is no folder"), (["--dataset", "."], "there is no GPU")],
)
def test_what_cannot_be_run_is_refused(arguments, monkeypatch, options, message):
    monkeypatch.setattr(gpu_cifar10.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        arguments(*options)
