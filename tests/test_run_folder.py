"""The output folder: settings named where they differ, one writer, nothing foreign removed."""

import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

import hf_mrpf
from hf_mrpf.run_folder import FORMAT, RunFolder, read_json, write_json

SETTINGS = {"eps": 0.2, "seed": 42}


def test_the_same_settings_go_on_and_stages_are_remembered(tmp_path):
    with RunFolder(tmp_path / "run", SETTINGS) as run:
        assert run.stage_result("dense") is None
        run.finish_stage("dense", {"epochs": 3})
    with RunFolder(tmp_path / "run", SETTINGS) as again:
        assert again.stage_result("dense") == {"epochs": 3}
        assert not again.finished
        again.finish()
    later = RunFolder(tmp_path / "run", SETTINGS)
    later.check()
    assert later.finished


def test_other_settings_are_named_and_overwrite_starts_again_without_touching_foreign_files(tmp_path):
    with RunFolder(tmp_path, SETTINGS) as run:
        run.finish_stage("dense", {})
        run.finish()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.onnx").write_text("of the model before")
    other = {"eps": 0.1, "seed": 42, "target": 0.5}
    with pytest.raises(ValueError, match=r"(?s)eps: 0.2 there, 0.1 here.*target: None there, 0.5 here") as error:
        RunFolder(tmp_path, other).check()
    assert "seed" not in str(error.value)
    assert "--overwrite_output_dir" in str(error.value)
    with RunFolder(tmp_path, other, overwrite=True) as run:
        assert run.stage_result("dense") is None
        assert not run.finished
        assert not (tmp_path / "export").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_second_live_writer_is_refused_with_the_pid_of_the_first(tmp_path):
    ready, opened = os.pipe()
    writer = os.fork()
    if writer == 0:
        try:
            with RunFolder(tmp_path, SETTINGS):
                os.write(opened, b"x")
                time.sleep(60)
        finally:
            os._exit(0)  # never back into pytest
    os.close(opened)
    try:
        assert os.read(ready, 1) == b"x"
        with (
            pytest.raises(ValueError, match=rf"written by another run \(pid {writer}"),
            RunFolder(tmp_path, SETTINGS),
        ):
            pass
        with pytest.raises(ValueError, match="written by another run"):
            RunFolder(tmp_path, SETTINGS).check()  # so a recipe learns it before it loads anything
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    with RunFolder(tmp_path, SETTINGS):  # the lock of a killed writer is gone with it
        assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"


def test_files_that_are_no_run_are_not_taken_for_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds config.json but no run.json"):
        RunFolder(tmp_path, SETTINGS).check()
    (tmp_path / "run.json").write_text('{"settings": ')
    with pytest.raises(ValueError, match=r"run.json is not valid JSON.*--overwrite_output_dir starts"):
        RunFolder(tmp_path, SETTINGS).check()
    with RunFolder(tmp_path, SETTINGS, overwrite=True) as run:
        assert not run.finished
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        RunFolder(file, SETTINGS).check()


def test_other_ranks_write_nothing(tmp_path):
    with RunFolder(tmp_path / "run", SETTINGS, is_main=False) as run:
        run.finish_stage("dense", {})
        run.finish()
    assert not (tmp_path / "run").exists()


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "state.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError):
        write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1}
    file.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"state.json is not valid JSON"):
        read_json(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds a list, not a JSON object"):
        read_json(file)


def test_publish_moves_every_file(tmp_path):
    with RunFolder(tmp_path / "run", SETTINGS) as run:
        draft = run.stage("result")
        draft.mkdir(parents=True)
        (draft / "README.md").write_text("card")
        run.publish(draft)
        assert (run.path / "README.md").read_text() == "card"
        assert not draft.exists()


def test_a_newer_format_is_refused_and_the_present_one_recorded(tmp_path):
    with RunFolder(tmp_path, SETTINGS):
        pass
    state = read_json(tmp_path / "run.json")
    assert (state["format"], state["version"]) == (FORMAT, hf_mrpf.__version__)
    write_json(tmp_path / "run.json", state | {"format": FORMAT + 1, "version": "9.1"})
    with pytest.raises(ValueError, match=rf"written by hf_mrpf 9.1 in format {FORMAT + 1}.*up to {FORMAT}. Update"):
        RunFolder(tmp_path, SETTINGS).check()
    RunFolder(tmp_path, SETTINGS, overwrite=True).check()


def as_nobody(action) -> str:
    """What `action` is refused with by a process without root's rights."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "not refused"
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            action()
        except ValueError as error:
            answer = str(error)
        except BaseException as error:
            answer = repr(error)
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answers:
        text = answers.read()
    os.waitpid(child, 0)
    return text


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work():
    with tempfile.TemporaryDirectory() as place:  # pytest's own may not be entered by others
        top = Path(place)
        top.chmod(0o755 if os.geteuid() == 0 else 0o555)
        for folder in (top, top / "new" / "run"):
            assert f"no permission for {top}," in as_nobody(RunFolder(folder, SETTINGS).check)
        top.chmod(0o777)
        assert as_nobody(RunFolder(top / "new" / "run", SETTINGS).check) == "not refused"
        (top / "run" / "stages" / "dense").mkdir(parents=True)
        write_json(top / "run" / "run.json", {"settings": SETTINGS, "finished": False})
        for folder in (top / "run", top / "run" / "stages"):
            folder.chmod(0o777)
        (top / "run" / "stages" / "dense").chmod(0o555)
        assert "stages/dense, or a read-only disk" in as_nobody(RunFolder(top / "run", SETTINGS).check)
        write_json(top / "run" / "run.json", {"settings": SETTINGS, "finished": True})
        assert as_nobody(RunFolder(top / "run", SETTINGS).check) == "not refused"  # nothing is left to be written
        (top / "run").chmod(0o700)
        assert "no permission" in as_nobody(RunFolder(top / "run", SETTINGS).check) or os.geteuid() != 0


def test_a_lock_left_to_a_child_of_a_killed_run_is_waited_for(tmp_path):
    ready, started = os.pipe()
    writer = os.fork()
    if writer == 0:
        file = os.open(tmp_path / "run.lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(file, fcntl.LOCK_EX)
        os.write(file, f"{os.getpid()}\n".encode())
        if os.fork() == 0:  # as a worker of a data loader, which notices late that its parent is gone
            time.sleep(1.5)
            os._exit(0)
        os.write(started, b"x")
        time.sleep(60)
    os.read(ready, 1)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    with RunFolder(tmp_path, SETTINGS):
        assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"


def test_the_others_hold_what_the_main_process_says(tmp_path):
    box = []

    def tell(value):
        box.append(value)
        return value

    def hear(value):
        return box.pop(0)

    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError) as told:
        RunFolder(tmp_path / "run", SETTINGS, share=tell).check()
    with pytest.raises(ValueError) as heard:
        RunFolder(tmp_path / "elsewhere", SETTINGS, is_main=False, share=hear).check()
    assert str(heard.value) == str(told.value)
    for asked in (lambda folder: folder.__enter__(), lambda folder: folder.finished):
        asked(RunFolder(tmp_path / "new", SETTINGS, share=tell))
        asked(RunFolder(tmp_path / "elsewhere", SETTINGS, is_main=False, share=hear))
    assert not box
    assert not (tmp_path / "elsewhere").exists()


def test_a_kill_while_an_old_run_is_cleared_leaves_nothing_that_passes_for_a_run(tmp_path, monkeypatch):
    with RunFolder(tmp_path, SETTINGS) as run:
        run.finish_stage("dense", {})
        run.finish()
    (tmp_path / "README.md").write_text("card")
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception), RunFolder(tmp_path, {"eps": 0.1}, overwrite=True):
        pass
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds stages but no run.json.*--overwrite_output_dir"):
        RunFolder(tmp_path, SETTINGS).check()
    with RunFolder(tmp_path, {"eps": 0.1}, overwrite=True) as run:
        assert run.stage_result("dense") is None


def test_what_cannot_be_cleared_is_told_and_no_new_run_begins_in_it(tmp_path, monkeypatch):
    with RunFolder(tmp_path, SETTINGS) as run:
        run.finish_stage("dense", {})
    unlink = os.unlink

    def refuse(path, **options):
        if Path(path).name == "stage.json":
            raise PermissionError("not yours")
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(PermissionError, match="not yours"), RunFolder(tmp_path, {"eps": 0.1}, overwrite=True):
        pass
    monkeypatch.undo()
    assert (run.stage("dense") / "stage.json").is_file()
    with pytest.raises(ValueError, match="holds stages but no run.json"):
        RunFolder(tmp_path, SETTINGS).check()


def test_the_model_of_a_finished_stage_is_checked(tmp_path):
    with RunFolder(tmp_path, SETTINGS) as run:
        model = run.stage("dense") / "model"
        model.mkdir(parents=True)
        (model / "model.safetensors").write_bytes(b"weights")
        run.finish_stage("dense", {"epochs": 1})
        run.check_stage("dense")
        assert run.stage_result("dense") == {"epochs": 1}
        (model / "model.safetensors").write_bytes(b"Weights")
        with pytest.raises(ValueError, match=r"model.safetensors is not as it was written \(7 bytes\).*remove"):
            run.check_stage("dense")
        (model / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"model.safetensors is missing"):
            run.check_stage("dense")
