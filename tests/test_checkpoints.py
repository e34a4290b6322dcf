"""Checkpoints: whole or skipped, ordered by step whatever the clock says, removed only after a newer one is marked."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import hf_mrpf.resumable
from hf_mrpf import MRPFConfig, MRPFTrainer, load_image_data
from hf_mrpf.checkpoints import MARKER, check_complete, discard, fault, mark_complete, newest_complete, rotate

SETTINGS = {
    "objective": "pgd",
    "eps": 0.1,
    "num_steps": 1,
    "eval_num_steps": 1,
    "per_device_train_batch_size": 32,
    "crop_padding": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 3,
}


def made(folder: Path, step: int) -> Path:
    """A complete checkpoint without a trainer."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "part").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"w" * 100)
    (checkpoint / "part" / "optimizer.pt").write_bytes(b"o" * 50)
    mark_complete(checkpoint, world_size=2)
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_the_marker_names_every_file_and_its_size(tmp_path):
    checkpoint = made(tmp_path, 3)
    assert json.loads((checkpoint / MARKER).read_text()) == {
        "files": {"model.safetensors": 100, "part/optimizer.pt": 50},
        "world_size": 2,
        "model_only": False,
    }
    assert fault(checkpoint) is None


@pytest.mark.parametrize(
    ("tear", "why"),
    [
        (lambda c: (c / MARKER).unlink(), "has no complete.json"),
        (lambda c: (c / "part" / "optimizer.pt").write_bytes(b"o" * 20), "part/optimizer.pt has 20 bytes, and 50"),
        (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda c: (c / MARKER).write_text('{"files": '), "complete.json cannot be read"),
        (lambda c: (c / MARKER).write_text('{"files": 3}'), "complete.json cannot be read"),
    ],
)
def test_a_torn_checkpoint_is_skipped_with_a_line_and_refused_where_it_is_forced(tmp_path, tear, why):
    whole, torn = made(tmp_path, 9), made(tmp_path, 10)
    tear(torn)
    lines = []
    assert newest_complete(tmp_path, say=lines.append) == whole  # 9 < 10, though not as text
    assert len(lines) == 1
    assert str(torn) in lines[0] and "skipped" in lines[0] and why in lines[0]
    with pytest.raises(ValueError, match=f"{torn}.*{why}.*newest complete one beside it is {whole}"):
        check_complete(torn)
    shutil.rmtree(whole)
    assert newest_complete(tmp_path, say=lines.append) is None
    with pytest.raises(ValueError, match="No checkpoint beside it is complete"):
        check_complete(torn)
    assert newest_complete(tmp_path / "nowhere") is None


def test_a_checkpoint_of_the_model_alone_is_no_place_to_go_on_from(tmp_path, data):
    trainer(data, tmp_path, save_only_model=True).train()
    lines = []
    assert newest_complete(tmp_path, say=lines.append) is None
    assert len(lines) == len(names(tmp_path)) > 0 and "--save_only_model kept no optimizer" in lines[0]
    with pytest.raises(ValueError, match="no complete checkpoint to go on from.*save_only_model kept no optimizer"):
        trainer(data, tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="cannot be gone on from: --save_only_model kept no optimizer"):
        trainer(data, tmp_path).train(resume_from_checkpoint=str(tmp_path / names(tmp_path)[0]))


def test_rotation_goes_by_step_and_spares_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 8, 10):
        made(tmp_path, step)
    os.utime(tmp_path / "checkpoint-8", (0, 0))
    (tmp_path / "checkpoint-6" / MARKER).unlink()
    rotate(tmp_path, 4, tmp_path / "checkpoint-8")
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2", "checkpoint-4", "checkpoint-8"]  # the torn one
    rotate(tmp_path, 3, tmp_path / "checkpoint-8")
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-8"]  # the one of a way that was left
    rotate(tmp_path, None, tmp_path / "checkpoint-8")
    rotate(tmp_path, 1, tmp_path / "checkpoint-8", "/elsewhere/checkpoint-2")
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-8"]


def test_what_a_kill_leaves_of_a_removal_is_torn(tmp_path, monkeypatch):
    checkpoint = made(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda path: pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception):
        discard(checkpoint)
    assert "no complete.json" in fault(checkpoint)


@pytest.fixture(scope="module")
def data():
    return load_image_data(max_train_samples=64, max_eval_samples=24)


def trainer(data, folder, *callbacks, **changes) -> MRPFTrainer:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    args = MRPFConfig(output_dir=str(folder), **(SETTINGS | changes))
    return MRPFTrainer(net, args, data.train, data.validation, callbacks=list(callbacks))


def weights(made: MRPFTrainer) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in made.model.state_dict().values()])


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Folder and weights of three steps, the first two an epoch; every step is saved."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    whole = trainer(data, folder)
    whole.train()
    return folder, weights(whole)


@pytest.fixture
def three_steps(uninterrupted, tmp_path):
    folder, expected = uninterrupted
    return shutil.copytree(folder, tmp_path / "run"), expected


@pytest.mark.parametrize("left", [3, 2, 1])
def test_true_takes_the_newest_complete_one_and_ends_with_the_same_weights(three_steps, data, left, caplog):
    folder, expected = three_steps
    for step in range(left + 1, 4):
        (folder / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    again = trainer(data, folder)
    steps = []
    step = again.training_step
    again.training_step = lambda *args, **kwargs: steps.append(1) or step(*args, **kwargs)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again), expected)
    assert (len(steps), again.state.global_step) == (3 - left, 3)
    assert [record.message.split()[0] for record in caplog.records if "skipped as torn" in record.message] == [
        str(folder / f"checkpoint-{step}") for step in range(3, left, -1)
    ]
    assert all(fault(folder / f"checkpoint-{step}") is None for step in (1, 2, 3))  # torn ones are written again


def test_a_torn_place_is_refused(three_steps, data):
    folder, _ = three_steps
    (folder / "checkpoint-2" / MARKER).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 cannot be gone on from: it has no complete.json"):
        trainer(data, folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer(data, folder).train(resume_from_checkpoint=True)


class Backwards(TrainerCallback):
    """A clock that is set back by an hour after every checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        time = 1e9 - 3600 * state.global_step
        os.utime(Path(args.output_dir) / f"checkpoint-{state.global_step}", (time, time))


def test_a_clock_that_runs_backwards_does_not_cost_the_newest(data, tmp_path):
    trainer(data, tmp_path, Backwards(), save_total_limit=2).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_an_older_checkpoint_is_there_until_the_newer_one_is_marked(data, tmp_path, monkeypatch):
    seen = []

    def mark(checkpoint, **kwargs):
        seen.append([path for path in names(tmp_path) if fault(tmp_path / path) is None])
        assert "no complete.json" in fault(checkpoint)
        mark_complete(checkpoint, **kwargs)

    monkeypatch.setattr(hf_mrpf.resumable, "mark_complete", mark)
    trainer(data, tmp_path, save_total_limit=1).train()
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"]]
    assert names(tmp_path) == ["checkpoint-3"]
    saved = json.loads((tmp_path / "checkpoint-3" / "training_args.json").read_text())
    assert saved["save_total_limit"] == 1


def test_the_best_checkpoint_is_found_in_a_folder_that_moved(data, tmp_path, monkeypatch):
    best_first = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}

    def scripted(folder, *figures):
        made = trainer(data, folder, **best_first)
        made._metrics = None
        figures = iter(figures)
        made.compute_metrics = lambda prediction: {"accuracy": 0.5, "robust_accuracy": next(figures)}
        return made

    monkeypatch.chdir(tmp_path)
    whole = scripted("here", 0.9, 0.2, 0.3)
    whole.train()
    assert names(tmp_path / "here") == ["checkpoint-1", "checkpoint-3"]  # the best, and where a resume goes on
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").rename(tmp_path / "elsewhere" / "there")
    again = scripted(tmp_path / "elsewhere" / "there")
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "elsewhere" / "there" / "checkpoint-1")
    assert torch.equal(weights(again), weights(whole))
