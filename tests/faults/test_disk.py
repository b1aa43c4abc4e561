"""A full disk: the run stops and says so, what was saved stays, and with room made it goes on as if nothing was."""

import random
import subprocess

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAST = "checkpoint_last.pth"
SETTINGS = dict(batch_size_train=2, save_every_n_iters=2, max_epoch=2)


class SmallDisk:
    """A file system of its own, of a size that can be changed: a tmpfs. Where none can be mounted, the system's limit
    on the size of a file stands in for it: writing fails in the same place, with another errno."""

    def __init__(self, path, size):
        path.mkdir()
        self.path = path
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        try:
            self.is_real = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            self.is_real = False

    def resize(self, size):
        if self.is_real:
            subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)

    def remove(self):
        if self.is_real:
            subprocess.run(["umount", "-l", str(self.path)], check=True)


@pytest.fixture()
def small_disk(tmp_path):
    """A function: a `SmallDisk` of a size in bytes."""
    disks = []

    def make(size):
        disks.append(SmallDisk(tmp_path / f"disk-{len(disks)}", size))
        return disks[-1]

    yield make
    for disk in disks:
        disk.remove()


def saved_steps(place, steps_saved):
    return max((steps_saved(path) for path in place.output_dir.glob(f"*/{LAST}")), default=0)


def test_the_disk_is_full(record, place, small_disk, steps_saved, assert_good, assert_same_run):
    """At the first checkpoint, at the second, at the best; each is first written beside those that are there."""
    reference = place("reference", **SETTINGS)
    whole = reference.finish()
    size = (whole / LAST).stat().st_size
    for room in (0.5, 1.5, 2.5, 3.5):
        disk = small_disk(int(room * size) // 4096 * 4096)
        full = place(f"full-{room}", folder=disk.path)
        limit = {"do": "limit files", "at": "save", "count": int(room) + 1, "bytes": size // 2}
        with record.attempt("disk full") as attempt:
            if not disk.is_real:
                attempt.notes("no tmpfs could be mounted: a limit on the size of files stood in for it")
            run = full.start(*([] if disk.is_real else [limit]))
            assert run.wait() == 2, run.end
            print(run.output.splitlines()[-1])
            assert "error: " in run.output and "could not be written (" in run.output and "Traceback" not in run.output
            if disk.is_real:
                assert "No space left on device" in run.output
            saved = saved_steps(full, steps_saved)
            assert bool(saved) == (room > 1)
            for path in full.output_dir.glob("*/*.pth"):
                assert_good(path)
            attempt.loses("optimizer steps computed again", full.steps()[-1] - saved)
            assert not [path for path in full.output_dir.rglob("*.tmp")]
            disk.resize(20 * size)
            folder = full.finish()
            assert full.steps()[0] == saved + 1
            assert_same_run(folder, whole)


def test_somebody_fills_the_disk(record, place, small_disk, steps_saved, assert_good, assert_same_run):
    """To the last byte: where a log's first line is to be written (at the end of the first epoch, 7 steps), or the
    predictions, and at random steps."""
    whole = place("reference", **SETTINGS).finish()
    size = (whole / LAST).stat().st_size
    choose = random.Random(6)
    moments = [("step", 7), ("evaluate", 1), ("step", choose.randint(1, 6)), ("step", choose.randint(8, 14))]
    for number, (event, count) in enumerate(moments):
        disk = small_disk(20 * size)
        if not disk.is_real:
            pytest.skip("no tmpfs can be mounted here (it wants root), so no disk can be filled")
        full = place(f"filled-{number}", folder=disk.path)
        ballast = disk.path / "ballast"
        with record.attempt("disk full") as attempt:
            run = full.start({"do": "fill", "at": event, "count": count, "path": str(ballast)})
            code = run.wait()
            print(f"filled at {event} {count}: exit code {code}\n{run.output.splitlines()[-1]}")
            assert code == 2 and "No space left on device" in run.output and "Traceback" not in run.output, run.end
            for path in full.output_dir.glob("*/*.pth"):
                assert_good(path)
            saved = saved_steps(full, steps_saved)
            attempt.loses("optimizer steps computed again", full.steps()[-1] - saved)
            ballast.unlink()
            folder = full.finish()
            assert not full.steps() or full.steps()[0] == saved + 1
            assert_same_run(folder, whole)
