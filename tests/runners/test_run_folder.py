import errno
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import stat

import pytest
import torch

from lavis_kvmod.runners import run_folder
from lavis_kvmod.runners.run_folder import BEST, LAST, RunFolder, RunFolderError, checkpoint_problem, find_newest_run
from lavis_kvmod.runners.training_state import RunState
from lavis_kvmod.weights import files as checkpoints


def contents(epoch, batch=0, size=1000):
    state = RunState(epoch=epoch, batch=batch)
    return {
        "model": {"w": torch.full((size,), float(epoch))},
        "optimizer": {},
        "epoch": epoch,
        "state": state.to_dict(),
    }


def damage(path):
    """Flip a byte of a tensor, as a failing disk does: the file still opens."""
    data = bytearray(path.read_bytes())
    at = data.find(torch.full((4,), float(epoch_of(path))).numpy().tobytes())
    data[at] ^= 0x10
    path.write_bytes(bytes(data))


def epoch_of(path):
    return checkpoints.read(path)["epoch"]


def names(folder):
    return {p.name: epoch_of(p) for p in folder.path.glob("*.pth")}


@pytest.fixture()
def folder(tmp_path):
    made = RunFolder.create(tmp_path, "a")
    yield made
    made.release()


def test_checkpoints_move_on_and_as_many_as_asked_stay(folder):
    for epoch in range(5):
        folder.save_last(contents(epoch), keep=3)
    assert names(folder) == {LAST: 4, "checkpoint_last-1.pth": 3, "checkpoint_last-2.pth": 2}
    folder.save_last(contents(9), keep=3, in_place=True)
    assert names(folder) == {LAST: 9, "checkpoint_last-1.pth": 3, "checkpoint_last-2.pth": 2}
    folder.save_last(contents(10), keep=1)
    assert names(folder) == {LAST: 10}


def test_the_names_are_on_the_disk_before_the_next_step_counts_on_them(folder, monkeypatch):
    """The older ones moved on, then the new one in place: the folder is synced after either."""
    folder.save_last(contents(0), keep=2)
    events, replace, fsync = [], os.replace, os.fsync

    def replaced(source, target):
        events.append(os.path.basename(target))
        return replace(source, target)

    def synced(opened):
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            events.append("synced")
        return fsync(opened)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "fsync", synced)
    folder.save_last(contents(1), keep=2)
    written, moved, placed = "checkpoint_next.pth", "checkpoint_last-1.pth", LAST
    assert events == [written, "synced", moved, "synced", placed, "synced"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("call", range(6))
def test_at_every_moment_of_saving_a_good_one_is_there(tmp_path, in_process, monkeypatch, links, call):
    """Killed before each of the calls that change a name."""

    def killed():
        made = RunFolder.create(tmp_path, "a")
        for epoch in range(3):
            made.save_last(contents(epoch), keep=3)
        calls = []
        for name in ("replace", "link"):
            change = getattr(os, name)

            def dying(*args, change=change, name=name):
                if len(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls.append(name)
                if name == "link" and not links:
                    raise OSError("no links here")
                return change(*args)

            setattr(os, name, dying)
        made.save_last(contents(3), keep=3)

    code, output = in_process(killed)
    assert code in (0, -signal.SIGKILL), output
    assert code == -signal.SIGKILL or call >= 4
    found = find_newest_run(tmp_path)
    assert epoch_of(found.checkpoint) == (2 if code else 3)
    assert not list(found.path.glob("*.tmp")) and not (found.path / "checkpoint_next.pth").exists()
    found.release()


def test_auto_takes_the_newest_good_one_and_sets_damaged_ones_aside(folder, tmp_path, caplog):
    for epoch in range(3):
        folder.save_last(contents(epoch), keep=3)
    folder.save_best(contents(0))
    folder.release()
    damage(folder.path / LAST)
    (folder.path / "checkpoint_last-1.pth").write_bytes(b"nothing")
    assert "does not match its checksum" in checkpoint_problem(folder.path / LAST)
    found = find_newest_run(tmp_path)
    assert found.checkpoint == folder.path / "checkpoint_last-2.pth" and found.continues
    assert (
        "does not match its checksum" in caplog.text
        and "checkpoint_last-1.pth (7 bytes) is not a readable" in caplog.text
    )
    assert {p.name for p in folder.path.glob("*.unreadable")} == {
        f"{LAST}.unreadable",
        "checkpoint_last-1.pth.unreadable",
    }
    found.save_last(contents(7), keep=3)
    assert names(found) == {LAST: 7, "checkpoint_last-2.pth": 0, BEST: 0}  # the good one is still there
    found.release()


def test_the_best_serves_where_the_last_are_gone(folder, tmp_path):
    folder.save_best(contents(2))
    folder.save_last(contents(3))
    folder.release()
    damage(folder.path / LAST)
    found = find_newest_run(tmp_path)
    assert found.checkpoint.name == BEST
    found.release()


def test_newest_is_what_was_begun_last_whatever_the_clock_says(tmp_path):
    for name in ("20300101-000000", "20200101-000000", "20250101-000000"):
        made = RunFolder.create(tmp_path, name)
        made.save_last(contents(0))
        made.release()
        os.utime(made.path, (0, 0))
    RunFolder.create(tmp_path, "20310101-000000").release()  # has saved nothing
    found = find_newest_run(tmp_path)
    assert found.path.name == "20250101-000000"
    found.release()
    damage_all = list(found.path.glob("*.pth"))
    for path in damage_all:
        path.write_bytes(b"")
    older = find_newest_run(tmp_path)
    assert older.path.name == "20200101-000000"
    older.release()
    assert find_newest_run(tmp_path / "nowhere") is None


def test_two_runs_that_start_at_once_get_two_folders(tmp_path):
    first, second = RunFolder.create(tmp_path, "now"), RunFolder.create(tmp_path, "now")
    assert (first.path.name, second.path.name) == ("now", "now-2")


def test_a_second_run_in_a_folder_is_refused_and_told_by_whom(tmp_path, monkeypatch):
    """The first is another process, which holds the folder until it ends."""
    monkeypatch.setattr(run_folder, "_LOCK_WAIT", 0)
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def hold():
        made = RunFolder.create(tmp_path, "a")
        made.add_start({"pid": 4242, "host": "there", "time": "noon"})
        made.save_last(contents(0))
        ready.set()
        signal.pause()

    first = context.Process(target=hold)
    first.start()
    try:
        assert ready.wait(60)
        with pytest.raises(RunFolderError, match=r"a is in use by another run \(process 4242 on there, since noon\)"):
            find_newest_run(tmp_path)
    finally:
        first.kill()
        first.join()
    find_newest_run(tmp_path).release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_told_and_no_other_run_tidied(tmp_path, monkeypatch, caplog, code):
    old = RunFolder.create(tmp_path, "old")
    old.release()
    (old.path / f".{LAST}.123.tmp").write_bytes(b"half")

    def flock(opened, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            RunFolder.create(tmp_path, "new")
        return
    made = RunFolder.create(tmp_path, "new")
    made.save_last(contents(0))
    made.release()
    assert f"{made.path}: this file system has no locks" in caplog.text
    assert list(old.path.glob(".*.tmp"))


def test_what_a_killed_writer_left_is_removed_where_nobody_writes(tmp_path):
    old, busy = RunFolder.create(tmp_path, "old"), RunFolder.create(tmp_path, "busy")
    for made in (old, busy):
        (made.path / f".{LAST}.123.tmp").write_bytes(b"half")
        (made.path / "result").mkdir()
        (made.path / "result" / ".val_epoch0.json.123.tmp").write_bytes(b"half")
    old.release()
    RunFolder.create(tmp_path, "new").release()
    assert not list(old.path.rglob(".*.tmp")) and len(list(busy.path.rglob(".*.tmp"))) == 2
    busy.release()


def test_a_full_disk_is_told_and_costs_nothing(tmp_path, in_process):
    """The system's limit on file sizes stands in for the disk's: writing fails in the middle."""

    def full():
        made = RunFolder.create(tmp_path, "a")
        made.save_last(contents(0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            made.save_last(contents(1, size=1_000_000))
        except RunFolderError as error:
            print("told:", error)

    code, output = in_process(full)
    assert code == 0 and "checkpoint_last.pth could not be written (" in output
    assert f"Checkpoints that are intact: {LAST}." in output and "MiB are free" in output
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [".lock", LAST, "environment.json"]
    assert checkpoint_problem(tmp_path / "a" / LAST) is None


def test_environment_counts_starts(folder):
    folder.add_start({"pid": 1})
    folder.add_start({"pid": 2})
    about = json.loads((folder.path / "environment.json").read_text())
    assert about == {"number": 1, "starts": [{"pid": 1}, {"pid": 2}]}


def test_a_checkpoint_of_something_else_is_no_place_to_go_on(tmp_path):
    checkpoints.save({"model": {}}, tmp_path / "w.pth")
    assert "lacks optimizer, epoch" in checkpoint_problem(tmp_path / "w.pth")
