"""The journal: whose entries it goes on with, and that nothing which lies at its place is lost."""

import json
import logging

import pytest
from process_group import on_processes

from hf_mrpf.journal import Journal
from hf_mrpf.processes import Processes

OURS, OTHER = {"weights": "a", "eps": 0.1}, {"weights": "b", "eps": 0.1}


def entries(path, subject, *new):
    """What the journal knows of the subject as it begins; `new` is added."""
    with Journal(path, subject, keep=True) as journal:
        known = list(journal.entries)
        for entry in new:
            journal.add(entry)
    return known


def refusal(path):
    processes = Processes.of(True)
    with pytest.raises(ValueError, match="holds something else") as error, Journal(path, OURS, processes):
        pass
    return processes.rank, str(error.value)


def test_entries_of_another_subject_are_moved_aside_with_a_warning_each_time(tmp_path, caplog):
    path = tmp_path / "verdicts.jsonl"
    for number, subject in enumerate((OURS, OTHER, OURS)):
        caplog.clear()
        assert entries(path, subject, {"image": number}) == []
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(said) == (number > 0) and all(f"kept as verdicts.jsonl.{number}." in line for line in said)
    assert entries(tmp_path / "verdicts.jsonl.1", OURS) == [{"image": 0}]
    assert entries(tmp_path / "verdicts.jsonl.2", OTHER) == [{"image": 1}]
    assert entries(path, OURS) == [{"image": 2}]


def test_entries_of_another_subject_are_gone_where_they_are_not_to_be_kept(tmp_path):
    path = tmp_path / "sensitivity.jsonl"
    for subject in (OURS, OTHER):
        with Journal(path, subject) as journal:
            assert journal.entries == []
            journal.add({"score": 1.0})
    assert [each.name for each in tmp_path.iterdir()] == ["sensitivity.jsonl"]


def test_a_journal_without_entries_is_begun_anew(tmp_path, caplog):
    path = tmp_path / "verdicts.jsonl"
    head = json.dumps({"subject": OTHER}).encode()
    for held in (b"", head + b"\n", head, head[:-1], head[:5], head + b'\n{"ima'):
        path.write_bytes(held)
        assert entries(path, OURS) == []
        assert path.read_bytes() == json.dumps({"subject": OURS}).encode() + b"\n"
    assert [each.name for each in tmp_path.iterdir()] == ["verdicts.jsonl"] and not caplog.records


@pytest.mark.parametrize("keep", [True, False])
def test_what_follows_a_damaged_line_is_found_again_and_kept_aside(tmp_path, caplog, keep):
    path = tmp_path / "verdicts.jsonl"
    entries(path, OURS, {"image": 0}, {"image": 1}, {"image": 2})
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:2], b"\n", b"oops\r\n", *lines[2:]])
    path.write_bytes(damaged)
    with Journal(path, OURS, keep=keep) as journal:
        assert journal.entries == [{"image": 0}]
        journal.add({"image": 1})
    assert (tmp_path / "verdicts.jsonl.1").read_bytes() == damaged
    assert "line 4 is damaged" in caplog.text and "kept as verdicts.jsonl.1" in caplog.text
    assert entries(path, OURS) == [{"image": 0}, {"image": 1}]
    # One about something else is moved aside though none of its entries can be read.
    path.write_bytes(b"".join([lines[0], b"oops\n"]))
    assert entries(path, OTHER) == []
    assert (tmp_path / "verdicts.jsonl.2").read_bytes() == b"".join([lines[0], b"oops\n"])


@pytest.mark.parametrize(
    "held",
    [
        b"my notes\n",
        b"my notes",
        b"\n",
        b"\x93NUMPY\x00",
        b'{"image": 1}\n',
        b'{"subject": "physics", "text": "..."}',
        b'{"subject": "physics"}\n',
        b"[1]\n",
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(tmp_path, held):
    path = tmp_path / "notes.txt"
    path.write_bytes(held)
    with pytest.raises(ValueError, match=r"notes\.txt holds something else.*Give another name"):
        entries(path, OURS)
    assert path.read_bytes() == held and len(list(tmp_path.iterdir())) == 1


def test_every_process_refuses_what_the_main_one_finds(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    (rank, first), (other, second) = on_processes(2, refusal, path, timeout=60)
    assert (rank, other) == (0, 1) and first == second
    assert path.read_text() == "my notes\n"
