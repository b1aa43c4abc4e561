"""What happens to samples that cannot be used: in a data set, through a DataLoader's workers, over an epoch."""

import logging
import pickle

import pytest
from lavis.processors.blip_processors import BlipImageEvalProcessor, BlipQuestionProcessor
from torch.utils.data import DataLoader

from lavis_kvmod.datasets.annotated import VQAEvalData, VQATrainData
from lavis_kvmod.datasets.bad_samples import BadDataError, BadSampleCounter, BadSamplePolicy

ORDER = ("astronaut.png", "more/camera.png", "chelsea.png", "more/coffee.png", "rocket.jpg", "more/retina.jpg")


def dataset(photos, cls=VQATrainData, times=1, **policy):
    names = ORDER * times
    annotations = [
        {
            "image": str(photos / name),
            "image_id": name,
            "source": f"train.csv, row {row}",
            "question": f"what is in picture {row}?",
            "question_id": row,
            "answer": ["a thing"],
        }
        for row, name in enumerate(names, start=2)
    ]
    return cls(BlipImageEvalProcessor(28), BlipQuestionProcessor(), annotations, policy=BadSamplePolicy(**policy))


def cut(path):
    path.write_bytes(path.read_bytes()[:2000])


def epoch(dataset, num_workers=0, batch_size=4):
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=dataset.collater, num_workers=num_workers)
    return list(loader)


# ------------------------------------------------------------ the data set


@pytest.mark.parametrize("num_workers", [0, 2])
def test_raise_names_file_and_row(photos, num_workers):
    cut(photos / "chelsea.png")
    with pytest.raises(BadDataError, match=r"train.csv, row 4: .*chelsea.png: not readable: .*on_bad_sample: skip"):
        epoch(dataset(photos), num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skip_takes_the_next_sample_and_says_so(photos, num_workers):
    cut(photos / "chelsea.png")
    (photos / "more/coffee.png").unlink()
    first, second = epoch(dataset(photos, on_bad_sample="skip", max_bad_share=0.5), num_workers)
    # rows 2, 3, then 6 in place of 4 and of 5
    assert [text.split()[-1] for text in first["text_input"]] == ["2?", "3?", "6?", "6?"]
    assert first["image"].shape == (4, 3, 28, 28)
    row_4, row_5, again = first["bad_samples"]
    assert row_4.startswith("train.csv, row 4: ") and "chelsea.png: not readable: " in row_4
    assert row_5.startswith("train.csv, row 5: ") and row_5.endswith("coffee.png: no such file")
    assert again == row_5
    assert "bad_samples" not in second


def test_past_the_last_comes_the_first(photos):
    cut(photos / "more/retina.jpg")
    assert dataset(photos, on_bad_sample="skip", max_bad_share=0.5)[5]["text_input"].endswith("2?")


def test_an_evaluated_replacement_carries_its_own_ids(photos):
    cut(photos / "chelsea.png")
    sample = dataset(photos, VQAEvalData, on_bad_sample="skip", max_bad_share=0.5)[2]
    assert (sample["instance_id"], sample["question_id"], sample["image_id"]) == ("3", 5, "more/coffee.png")


def test_more_in_a_row_than_may_be_bad_at_all_ends_it(photos):
    """Otherwise a data set whose disk is gone would be searched from end to end for every sample."""
    for name in ORDER:
        cut(photos / name)
    with pytest.raises(BadDataError, match=r"4 samples in a row could not be read, more than max_bad_share: 0.5 of 6"):
        dataset(photos, on_bad_sample="skip", max_bad_share=0.5)[1]
    with pytest.raises(BadDataError, match="7 samples in a row"):
        dataset(photos, on_bad_sample="skip", max_bad_share=1.0)[1]


def test_skipping_is_logged_at_once_but_not_without_end(photos, caplog):
    cut(photos / "chelsea.png")
    (photos / "rocket.jpg").unlink()
    skipping = dataset(photos, times=14, on_bad_sample="skip", max_bad_share=0.5)
    epoch(skipping)
    cut_short, gone = [record.message for record in caplog.records if record.message.startswith("skipped: ")]
    assert "row 4" in cut_short and "chelsea.png" in cut_short and "rocket.jpg: no such file" in gone
    assert gone.endswith("; others like it are counted at the epoch's end")


def test_other_errors_are_not_taken_for_bad_images(photos):
    skipping = dataset(photos, on_bad_sample="skip")
    skipping.set_processors(lambda image: 1 / 0, skipping.text_processor)
    with pytest.raises(ZeroDivisionError):
        skipping[0]


def test_positions_outside_are_an_index_error(photos):
    data = dataset(photos)
    assert data[-1]["text_input"] == data[5]["text_input"]
    for index in (6, -7):
        with pytest.raises(IndexError):
            data[index]
    assert len(list(data)) == 6


# ------------------------------------------------------------ the epoch


def test_an_epoch_is_counted_through_the_workers(photos):
    cut(photos / "chelsea.png")
    data = dataset(photos, times=4, on_bad_sample="skip", max_bad_share=0.25)
    counter, lines = BadSampleCounter(data.max_bad_share, log=lambda *args: lines.append(args[0] % args[1:])), []
    for number in range(2):
        for batch in epoch(data, num_workers=2):
            counter.update(len(batch["text_input"]), batch.pop("bad_samples", []))
        assert counter.report(number) == 4
    assert [line.split("\n")[0] for line in lines] == [
        f"epoch {number}: 4 of 24 samples could not be read and were skipped" for number in range(2)
    ]
    assert lines[0].count("chelsea.png") == 4 and "train.csv, row 22" in lines[0]


def test_nothing_bad_is_nothing_to_report():
    counter = BadSampleCounter(0.0, log=lambda *args: pytest.fail("logged"))
    counter.update(4)
    assert counter.report(0) == 0 and counter.num_seen == 0


def test_at_the_end_the_share_is_exact():
    for bad, stops in ((1, False), (2, True)):
        counter = BadSampleCounter(0.1, log=lambda *args: None)
        counter.update(10 if bad == 1 else 19, [f"row {i}" for i in range(bad)])
        if stops:
            with pytest.raises(BadDataError, match="2 of 19 samples could not be read, more than max_bad_share: 0.1"):
                counter.report(0)
        else:
            counter.report(0)
        assert counter.num_bad == 0  # the next epoch starts anew


def test_a_hopeless_epoch_is_stopped_before_its_end():
    counter = BadSampleCounter(0.05)
    counter.update(1, ["row 0"])  # half of what has been seen, but the epoch has just begun
    with pytest.raises(BadDataError, match="51 of 51 samples"):
        for row in range(1, 1000):
            counter.update(0, [f"row {row}"])


def test_a_message_shows_a_dozen_and_counts_the_rest():
    counter = BadSampleCounter(0.0)
    with pytest.raises(BadDataError) as caught:
        counter.update(0, [f"row {row}" for row in range(100)])
    assert "row 11\n" in str(caught.value) and "row 12" not in str(caught.value)
    assert str(caught.value).endswith("… and 88 more")


# ------------------------------------------------------------ the keys


def test_policy_from_a_section():
    assert BadSamplePolicy.from_config({}) == BadSamplePolicy("raise", 0.05)
    assert BadSamplePolicy.from_config({"on_bad_sample": "skip", "max_bad_share": 0}).max_bad_share == 0
    with pytest.raises(BadDataError) as caught:
        BadSamplePolicy.from_config({"on_bad_sample": "ignore", "max_bad_share": 5})
    assert caught.value.problems == [
        "on_bad_sample: expected raise or skip, got 'ignore'",
        "max_bad_share: expected a number from 0 to 1, got 5",
    ]


def test_rows_are_judged_together(caplog):
    lines = ["a.csv, row 2: bad", "a.csv, row 9: bad"]
    with pytest.raises(BadDataError, match=r"2 of 20 rows cannot be used; mend them, or set on_bad_sample: skip\n"):
        BadSamplePolicy().judge(lines, 20)
    with pytest.raises(BadDataError, match=r"2 of 20 rows cannot be used, more than max_bad_share: 0.05\n"):
        BadSamplePolicy("skip").judge(lines, 20)
    with caplog.at_level(logging.WARNING):
        BadSamplePolicy("skip", 0.1).judge(lines, 20)
    assert "2 of 20 rows cannot be used and are left out\n    a.csv, row 2: bad\n    a.csv, row 9: bad" in caplog.text
    BadSamplePolicy().judge([], 20)


def test_the_error_crosses_processes():
    error = BadDataError(["one", "two"])
    assert str(pickle.loads(pickle.dumps(error))) == "one\ntwo"
