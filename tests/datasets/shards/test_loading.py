"""Batches from shards: none lost, none twice, and from any batch on exactly those that would have come."""

import collections
import itertools
import math
import subprocess
import sys

import pytest
import torch
from lavis.processors.blip_processors import BlipImageEvalProcessor, BlipImageTrainProcessor, BlipQuestionProcessor
from omegaconf import OmegaConf

from lavis_kvmod.datasets.bad_samples import BadSamplePolicy
from lavis_kvmod.datasets.loading.loader import PADDING
from lavis_kvmod.datasets.shards import datasets, stream
from lavis_kvmod.datasets.shards.builders import _patterns
from lavis_kvmod.datasets.shards.counting import write_indices
from lavis_kvmod.datasets.shards.datasets import WdsVQAEvalData, WdsVQATrainData
from lavis_kvmod.datasets.shards.files import find_shards
from lavis_kvmod.datasets.shards.plan import RankPlan

SIZES = (7, 1, 12, 4)  # pictures in each shard, with two questions each
TOTAL = 2 * sum(SIZES)


@pytest.fixture(scope="module")
def indexed(vqa_shards):
    """A folder of shards with an index."""
    folder = vqa_shards(SIZES, questions=2)
    write_indices([str(folder)])
    return folder


@pytest.fixture(scope="module")
def uncounted(vqa_shards):
    """The same without an index."""
    return vqa_shards(SIZES, questions=2)


def train_data(folder, **options) -> WdsVQATrainData:
    processors = BlipImageTrainProcessor(16), BlipQuestionProcessor()
    return WdsVQATrainData(*processors, find_shards([str(folder)]), **{"shuffle_buffer": 8, **options})


def eval_data(folder, **options) -> WdsVQAEvalData:
    processors = BlipImageTrainProcessor(16), BlipQuestionProcessor()
    return WdsVQAEvalData(*processors, find_shards([str(folder)]), **options)


def answers(batches):
    return [answer for batch in batches if PADDING not in batch for answer in batch["answer"]]


def everything(times=1):
    return collections.Counter({f"a{n}-{q}": times for n in range(sum(SIZES)) for q in range(2)})


def equal(batches, others):
    """Whether two lists of batches are equal to the bit, pictures included."""
    if len(batches) != len(others):
        return False
    for one, other in zip(batches, others):
        assert set(one) == set(other)
        if one["text_input"] != other["text_input"] or one["answer"] != other["answer"]:
            return False
        if not torch.equal(one["image"], other["image"]):
            return False
    return True


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("samples", [1, 6, 7, 48, 103])
def test_a_plan_deals_out_every_position_once(ranks, workers, samples):
    """Whatever the numbers, and with as many batches on each rank."""
    seen = collections.Counter()
    for rank in range(ranks):
        plan = RankPlan(samples, 4, rank, ranks, workers, even=True)
        shares = [plan.share(worker) for worker in range(workers)]
        for share in shares:
            seen.update(range(share.start, share.start + share.num_samples))
        assert sum(len(share.batch_sizes) + share.padding for share in shares) == plan.num_batches
        assert plan.num_batches == math.ceil(math.ceil(samples / ranks) / 4)
    assert seen == collections.Counter(range(samples))


@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 0), (3, 2)])
def test_an_epoch_has_every_sample_once_over_ranks_and_workers(indexed, ranks, workers):
    dataset, lengths, seen = train_data(indexed), set(), []
    for rank in range(ranks):
        loader = dataset.make_loader(batch_size=5, num_workers=workers, seed=3, rank=rank, world_size=ranks)
        loader.set_epoch(1)
        batches = list(loader)
        assert len(batches) == len(loader)
        lengths.add(len(batches))
        seen += answers(batches)
    assert collections.Counter(seen) == everything()
    assert len(lengths) == 1  # or the ranks would wait for each other


def test_fewer_shards_than_readers(vqa_shards):
    folder = vqa_shards([5])
    write_indices([str(folder)])
    dataset, seen = train_data(folder), []
    for rank in range(2):
        loader = dataset.make_loader(batch_size=2, num_workers=2, rank=rank, world_size=2)
        batches = list(loader)
        assert len(batches) == len(loader) == 2
        seen += answers(batches)
    assert sorted(seen) == [f"a{n}-0" for n in range(5)]


def test_a_rank_without_a_sample_left_gets_a_batch_that_counts_nothing(vqa_shards):
    folder = vqa_shards([3])
    write_indices([str(folder)])
    short = train_data(folder).make_loader(batch_size=1, rank=0, world_size=2)
    assert len(short) == 2
    first, second = short
    assert PADDING not in first and second[PADDING] is True
    assert second["image"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["indexed", "uncounted"])
def test_going_on_from_any_batch_gives_exactly_what_would_have_come(request, kind, workers):
    options = {} if kind == "indexed" else {"epoch_size": 31}
    dataset = train_data(request.getfixturevalue(kind), **options)

    def batches(rank, epoch, start=0):
        # A loader made anew, as after a restart.
        loader = dataset.make_loader(batch_size=4, num_workers=workers, seed=5, rank=rank, world_size=2)
        loader.set_epoch(epoch, start)
        return list(loader)

    for rank, epoch in ((0, 0), (1, 3)):
        whole = batches(rank, epoch)
        starts = range(len(whole) + 1) if workers == 0 else (1, 2, len(whole) - 1)
        for start in starts:
            assert equal(batches(rank, epoch, start), whole[start:])
        assert not equal(batches(rank, epoch + 1), whole)


def test_the_order_is_another_in_each_epoch_and_for_each_seed(indexed):
    def order(epoch, seed):
        loader = train_data(indexed).make_loader(batch_size=TOTAL, seed=seed)
        loader.set_epoch(epoch)
        return answers(loader)

    orders = [order(epoch, seed) for epoch, seed in itertools.product((0, 1), (0, 1))]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert order(1, 1) == orders[3]
    assert orders[0] != sorted(orders[0])


def test_a_sample_is_augmented_alike_whoever_reads_it(indexed):
    """The number of workers changes the order, but no picture; the epoch changes them."""

    def pictures(workers, epoch=0):
        loader = train_data(indexed).make_loader(batch_size=4, num_workers=workers, seed=5)
        loader.set_epoch(epoch)
        return {answer: image for batch in loader for answer, image in zip(batch["answer"], batch["image"])}

    alone, together, later = pictures(0), pictures(2), pictures(0, epoch=1)
    assert all(torch.equal(alone[answer], together[answer]) for answer in everything())
    assert sum(torch.equal(alone[answer], later[answer]) for answer in everything()) < TOTAL / 4


def test_reading_does_not_touch_the_runs_own_randomness(indexed):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for workers in (0, 2):
        next(iter(train_data(indexed).make_loader(batch_size=4, num_workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_skipped_is_not_decoded_and_its_shards_are_not_opened(indexed, monkeypatch):
    decoded, opened = [], []
    read_image, rows_by_sample = datasets.read_image, stream.rows_by_sample
    monkeypatch.setattr(datasets, "read_image", lambda *a, **k: decoded.append(1) or read_image(*a, **k))
    monkeypatch.setattr(
        stream, "rows_by_sample", lambda path, *a, **k: opened.append(path) or rows_by_sample(path, *a, **k)
    )
    loader = train_data(indexed, shuffle_buffer=2).make_loader(batch_size=4, seed=1)
    loader.set_epoch(0, len(loader) - 1)
    (last,) = loader
    assert len(decoded) == len(last["answer"]) == 4
    shard_of = [shard for shard, size in enumerate(SIZES) for _ in range(size)]
    needed = {shard_of[int(answer[1:].split("-")[0])] for answer in last["answer"]}
    assert len(needed) < len(SIZES) and sorted(path.name for path in opened) == sorted(f"{n:03d}.tar" for n in needed)


def test_epochs_shorter_than_the_data_go_through_all_of_it(indexed):
    dataset, seen = train_data(indexed, epoch_size=TOTAL // 4), []
    for rank in range(2):
        loader = dataset.make_loader(batch_size=5, rank=rank, world_size=2)
        for epoch in range(8):
            loader.set_epoch(epoch)
            seen += answers(loader)
    assert collections.Counter(seen) == everything(2)


def test_without_an_index_an_epoch_has_the_size_that_is_set(uncounted):
    for size, workers, ranks in ((TOTAL, 0, 1), (31, 2, 2), (100, 0, 3)):
        dataset, seen = train_data(uncounted, epoch_size=size), []
        for rank in range(ranks):
            seen += answers(dataset.make_loader(batch_size=8, num_workers=workers, rank=rank, world_size=ranks))
        assert len(seen) == size == len(dataset)
    assert (
        collections.Counter(answers(train_data(uncounted, epoch_size=TOTAL).make_loader(batch_size=8))) == everything()
    )


def test_without_an_index_short_epochs_still_reach_every_part_of_a_shard(uncounted):
    """Starting each at the head of a shard, as webdataset does, would never reach its tail."""
    loader = train_data(uncounted, epoch_size=6).make_loader(batch_size=6)
    seen = collections.Counter()
    for epoch in range(60):
        loader.set_epoch(epoch)
        seen.update(answers(loader))
    assert set(seen) == set(everything())


def test_without_an_index_and_a_size_there_is_no_epoch(uncounted):
    with pytest.raises(ValueError, match=r"an index or an epoch_size that says how many; got .*000.tar and 3 more"):
        train_data(uncounted)


@pytest.mark.parametrize("ranks, workers", [(1, 0), (3, 2)])
def test_an_evaluation_counts_every_sample_once(indexed, ranks, workers):
    dataset, seen = eval_data(indexed), []
    for rank in range(ranks):
        loader = dataset.make_loader(batch_size=5, num_workers=workers, rank=rank, world_size=ranks)
        batches = list(loader)
        assert len(batches) == len(loader)
        seen += [annotation for batch in batches for annotation in batch["annotation"]]
    ids = [annotation["instance_id"] for annotation in seen]
    assert len(set(ids)) == len(ids) == TOTAL == len(dataset)
    assert {answer for annotation in seen for answer in annotation["answer"]} == set(everything())
    if workers == 0:
        assert ids == sorted(ids)


def test_an_evaluation_batch_has_what_tasks_want(indexed):
    batch = next(iter(eval_data(indexed).make_loader(batch_size=3)))
    assert set(batch) == {
        *("image", "text_input", "question_id", "image_id", "instance_id"),
        *("answer", "weight", "n_answers", "annotation"),
    }
    assert batch["instance_id"] == ["p00000#0", "p00000#1", "p00001#0"]
    assert batch["question_id"].tolist() == [0, 1, 10] and batch["image_id"] == ["p00000", "p00000", "p00001"]
    annotation = batch["annotation"][2]
    assert annotation["instance_id"] == "p00001#0" and annotation["answer"] == ["a1-0"]
    assert annotation["source"].endswith("000.tar, p00001")


def test_equal_image_keys_mean_equal_pixels(write_shard, picture, tmp_path):
    """Also where shards of different makers call their images alike."""
    rows = [{"image": "0.png", "question": "q?", "answer": ["a"]}] * 2
    for n in range(2):
        write_shard(tmp_path / f"{n}" / "a.tar", [{"__key__": f"k{n}", "png": picture(n), "json": rows}])
    write_indices([str(tmp_path / "*" / "a.tar")])
    shards = find_shards([str(tmp_path / "*" / "a.tar")])
    (batch,) = WdsVQAEvalData(BlipImageEvalProcessor(16), BlipQuestionProcessor(), shards).make_loader(batch_size=9)
    first, again, second, _ = batch["image_key"]
    assert first == again != second and not torch.equal(batch["image"][0], batch["image"][2])


def test_a_batch_may_have_each_image_once(indexed):
    """In the same order, with the same samples; a view hangs on seed, epoch and image, whoever reads it."""

    def read(dataset, **options):
        return list(dataset.make_loader(batch_size=5, seed=3, **options))

    for data in (train_data(indexed), eval_data(indexed)):
        apart, grouped = read(data), read(data, group_by_image=True)
        assert [batch["text_input"] for batch in grouped] == [batch["text_input"] for batch in apart]
        assert all(len(batch["image_index"]) == len(batch["text_input"]) for batch in grouped)
    assert [len(batch["image"]) for batch in grouped[:4]] == [3, 3, 3, 3]  # 5 questions of 3 images, in order
    training = train_data(indexed)
    seen = [
        {
            answer: batch["image"][index]
            for batch in batches
            for answer, index in zip(batch["answer"], batch["image_index"])
        }
        for batches in (read(training, group_by_image=True), read(training, group_by_image=True, num_workers=2))
    ]
    assert all(torch.equal(seen[0][answer], seen[1][answer]) for answer in everything())
    assert all(torch.equal(seen[0][f"a{n}-0"], seen[0][f"a{n}-1"]) for n in range(sum(SIZES)))


def test_a_training_batch_is_lavis_vqa_batch(indexed):
    batch = next(iter(train_data(indexed).make_loader(batch_size=3)))
    assert set(batch) == {"image", "text_input", "answer", "weight", "n_answers", "sample_seeds"}
    assert len(set(batch["sample_seeds"])) == 3
    assert batch["image"].shape == (3, 3, 16, 16) and batch["weight"].tolist() == [1, 1, 1]


def test_there_is_no_sample_by_index(indexed):
    with pytest.raises(TypeError, match="use runner: runner_kvmod"):
        train_data(indexed)[0]


def test_more_batches_than_an_epoch_has(indexed):
    loader = train_data(indexed).make_loader(batch_size=10)
    with pytest.raises(ValueError, match="expected at most the 5 batches of an epoch, got 6"):
        loader.set_epoch(0, 6)


def test_lavis_concatenation_of_data_sets_takes_it(indexed):
    """LAVIS concatenates what is trained on, which a torch IterableDataset does not survive."""
    from lavis.datasets.data_utils import concat_datasets

    dataset = train_data(indexed)
    assert concat_datasets({"train": [dataset]})["train"].datasets == [dataset]


def test_a_shard_deleted_while_training_is_named(vqa_shards):
    folder = vqa_shards([4, 4, 4])
    write_indices([str(folder)])
    loader = train_data(folder, policy=BadSamplePolicy("skip")).make_loader(batch_size=2, num_workers=2)
    list(loader)
    (folder / "001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"^no shard .*001.tar; it has been moved or deleted since"):
        list(loader)  # without the worker's traceback


def test_a_rank_without_samples_can_have_one(vqa_shards):
    """Ranks that must keep in step in an evaluation."""
    folder = vqa_shards([1])
    write_indices([str(folder)])
    loader = eval_data(folder).make_loader(batch_size=2, num_workers=2, rank=0, world_size=2)
    assert len(loader) == 0 and list(loader) == []
    assert loader.first_sample()["instance_id"] == ["p00000"]


RANK_SCRIPT = """
import collections, sys
import torch.distributed as dist
from lavis.processors.blip_processors import BlipImageTrainProcessor, BlipQuestionProcessor
from lavis_kvmod.datasets.shards.datasets import WdsVQAEvalData, WdsVQATrainData
from lavis_kvmod.datasets.shards.files import find_shards

dist.init_process_group("gloo")
where = dict(rank=dist.get_rank(), world_size=dist.get_world_size())
shards = find_shards([sys.argv[1]])
for cls in (WdsVQATrainData, WdsVQAEvalData):
    data = cls(BlipImageTrainProcessor(16), BlipQuestionProcessor(), shards)
    loader = data.make_loader(batch_size=5, num_workers=2, **where)
    seen = []
    for number, batch in enumerate(loader):
        if data.for_training:
            dist.barrier()  # would wait for ever if a rank had fewer
        seen += [] if "is_padding" in batch else batch["answer"]
    both = [None, None]
    dist.all_gather_object(both, seen)
    assert both[0] and both[1]
    assert collections.Counter(both[0] + both[1]) == collections.Counter(
        f"a{n}-{q}" for n in range(int(sys.argv[2])) for q in range(2)
    )
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_real_processes_share_the_data(indexed, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    arguments = [str(indexed), str(sum(SIZES))]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def test_annotators_without_an_answer_keep_the_weights_of_the_others(write_shard, picture, tmp_path):
    """As in VQAv2: what is blank is not learnt, and the rest weighs what it weighed."""
    rows = [
        {"question": "a?", "answer": ["x", " ", "y", "y"]},
        {"question": "b?", "answer": ["x", "", "y"], "weight": [0.5, 0.3, 0.2]},
    ]
    write_shard(tmp_path / "a.tar", [{"__key__": "k", "png": picture(0), "json": rows}])
    write_indices([str(tmp_path / "a.tar")])
    shards = find_shards([str(tmp_path / "a.tar")])
    data = WdsVQAEvalData(BlipImageEvalProcessor(16), BlipQuestionProcessor(), shards)
    (batch,) = data.make_loader(batch_size=2)
    assert batch["answer"] == ["x", "y"] * 2 and batch["n_answers"].tolist() == [2, 2]
    assert batch["weight"].tolist() == pytest.approx([0.25, 0.5, 0.5, 0.2])


def test_shards_of_a_split_may_be_named_bare():
    annotations = {"train": "a.tar", "val": ["b.tar", "c.tar"], "test": {"storage": "d.tar"}}
    section = OmegaConf.create({"build_info": {"annotations": annotations}})
    assert _patterns(section) == {"train": ["a.tar"], "val": ["b.tar", "c.tar"], "test": ["d.tar"]}
