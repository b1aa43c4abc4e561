"""Annotations as one block of memory that all workers share."""

import json
import multiprocessing
import pickle
import random

import psutil
import pytest

from lavis_kvmod.datasets.annotated import VQATrainData
from lavis_kvmod.datasets.row_store import RowStore

ROWS = [
    {"image": "/a/ü.jpg", "question_id": 7, "answer": ["a", "a", "b"], "weight": [0.5, 0.25, 1]},
    {"image": "/b.jpg", "question_id": "7", "caption": []},
    {"image": "/c.jpg", "question_id": 2.5, "answer": None, "image_id": 10**30},
]


def test_it_reads_as_the_list_it_was_made_of():
    store = RowStore(iter(ROWS))
    assert list(store) == ROWS and len(store) == 3 and store[-1] == ROWS[2] and store[1:] == ROWS[1:]
    assert json.loads(json.dumps(store[0])) == ROWS[0] and list(store[0]) == list(ROWS[0])
    assert type(pickle.loads(pickle.dumps(store[0]))) is dict
    assert list(pickle.loads(pickle.dumps(store))) == ROWS
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"no row {index} among 3"):
            store[index]
    assert len(RowStore([])) == 0 and not RowStore([])


def test_a_row_is_changed_as_a_whole():
    store = RowStore(ROWS)
    store[-2] = {**store[1], "caption": ["a house"], "new": 1}
    assert list(store) == [ROWS[0], {**ROWS[1], "caption": ["a house"], "new": 1}, ROWS[2]]
    with pytest.raises(TypeError, match=r"write annotation\[i\] = "):
        store[0]["answer"] = []
    with pytest.raises(TypeError, match=r"write annotation\[i\] = "):
        store[0].pop("answer")
    assert list(pickle.loads(pickle.dumps(store))) == list(store)


def _annotations(count):
    for i in range(count):
        answers = [f"answer {i % 50}"] * 7 + [f"answer {i % 70}"] * 3
        yield {"image": f"/images/{i // 5:012d}.jpg", "question": f"what is it, {i}?", "answer": answers}


def _touch(data, queue):
    """As an epoch does: every row, in another order."""
    order = list(range(len(data)))
    random.Random(0).shuffle(order)
    before = psutil.Process().memory_full_info().uss
    for i in order:
        data._texts(data.annotation[i])
    queue.put(psutil.Process().memory_full_info().uss - before)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="workers are forked here only")
def test_workers_do_not_copy_the_annotations_they_read():
    data = VQATrainData(None, str, _annotations(20_000))
    assert 20_000 * 100 < data.annotation.nbytes < 20_000 * 400
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_touch, args=(data, queue))
    worker.start()
    own = queue.get(timeout=60)
    worker.join()
    assert own < 3 * 2**20, f"{own / 2**20:.1f} MiB"
