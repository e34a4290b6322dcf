"""The output folder: settings named where they differ, one writer, nothing foreign removed."""

import json
import os
import subprocess
import sys

import pytest

from hf_mrpf.run_folder import RunFolder, read_json, write_json

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
    script = (
        "import sys, time\n"
        "from hf_mrpf.run_folder import RunFolder\n"
        f"with RunFolder({str(tmp_path)!r}, {SETTINGS!r}):\n"
        "    print('open', flush=True)\n"
        "    time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "open\n"
        with (
            pytest.raises(ValueError, match=rf"written by another run \(pid {writer.pid}"),
            RunFolder(tmp_path, SETTINGS),
        ):
            pass
        with pytest.raises(ValueError, match="written by another run"):
            RunFolder(tmp_path, SETTINGS).check()  # so a recipe learns it before it loads anything
    finally:
        writer.kill()
        writer.wait()
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
