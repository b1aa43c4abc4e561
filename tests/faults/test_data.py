"""What reads the data fails: a worker process is killed, a shard is gone."""

import random
import shutil
import signal

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAST = "checkpoint_last.pth"
SETTINGS = dict(batch_size_train=2, save_every_n_iters=2, max_epoch=2, num_workers=2)
SHARDS = dict(SETTINGS, dataset="wds_vqa")


def kill_a_worker(at, count, which=0):
    return {"do": "kill", "what": "worker", "at": at, "count": count, "which": which}


@pytest.mark.parametrize("dataset", ["coco_vqa", "wds_vqa"])
def test_a_data_worker_is_killed(record, place, assert_same_run, dataset):
    """As the system does when memory runs out. Another takes its place, and the batches stay the same."""
    choose = random.Random(12)
    whole = place("reference", dataset=dataset, **SETTINGS).finish()
    for number in range(2):
        lost = place(f"lost-{number}")
        with record.attempt("data worker killed"):
            folder = lost.finish(kill_a_worker("step", choose.randint(1, 6), number))
            assert "a data worker was lost" in lost.runs[0].output
            assert lost.steps() == list(range(1, 15))
            assert_same_run(folder, whole)


def test_data_workers_are_killed_again_and_again(record, place, assert_same_run, assert_good, steps_saved):
    """Then something is wrong with the machine: the run stops, and goes on when it is asked to."""
    whole = place("reference", **{**SETTINGS, "num_workers": 1, "batch_size_train": 1}).finish()
    lost = place("lost")
    with record.attempt("data worker killed", times=4) as attempt:
        run = lost.start(*({"do": "kill", "what": "workers", "at": "step", "count": n} for n in range(1, 14)))
        assert run.wait() not in (0, -signal.SIGKILL), run.end
        assert run.output.count("a data worker was lost") == 3
        assert "DataLoader worker (pid" in run.end.splitlines()[-1]
        (folder,) = lost.folders()
        assert_good(folder / LAST)
        attempt.loses("optimizer steps computed again", lost.steps()[-1] - steps_saved(folder / LAST))
        lost.finish()
        assert_same_run(folder, whole)


def test_a_worker_is_killed_while_evaluating(record, place, assert_same_run):
    """13 batches, of which four are being read ahead."""
    reference = place("reference", **{**SETTINGS, "max_epoch": 1, "batch_size_eval": 1})
    files = ",".join(str(reference.folder.parent / "data" / name) for name in ("train.json", "answers.json"))
    options = [f"datasets.coco_vqa.build_info.annotations.val.{key}=[{files}]" for key in ("url", "storage")]
    whole = reference.finish(options=options)
    lost = place("lost")
    with record.attempt("data worker killed"):
        folder = lost.finish(kill_a_worker("evaluate", 2), options=options)
        assert "a data worker was lost" in lost.runs[0].output
        assert_same_run(folder, whole)
        for name in ("val_epoch0.json", "val_epoch0.csv"):
            assert (folder / "result" / name).read_bytes() == (whole / "result" / name).read_bytes()


def test_a_shard_is_deleted(record, place, tmp_path, assert_same_run, assert_good, steps_saved):
    """At a random step; restored, the run goes on."""
    choose = random.Random(13)
    whole = place("reference", **SHARDS).finish()
    for number in range(3):
        shard = tmp_path / "data" / "train" / f"{number}.tar"
        shutil.copy(shard, tmp_path / "kept.tar")
        gone = place(f"gone-{number}")
        with record.attempt("shard deleted while training") as attempt:
            run = gone.start({"do": "delete", "at": "step", "count": choose.randint(1, 7), "path": str(shard)})
            code = run.wait()
            print(run.end.splitlines()[-1])
            assert code == 2 and f"error: no shard {shard}" in run.end and "Traceback" not in run.output, run.end
            saved = max((steps_saved(path) for path in gone.output_dir.glob(f"*/{LAST}")), default=0)
            attempt.loses("optimizer steps computed again", gone.steps()[-1] - saved)
            again = gone.start()
            assert again.wait() == 2 and str(shard) in again.output and "Traceback" not in again.output, again.end
            shutil.copy(tmp_path / "kept.tar", shard)
            assert_same_run(gone.finish(), whole)
