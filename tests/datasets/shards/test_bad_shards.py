"""Shards that are missing, cut short or hold what cannot be used: named, or counted, and never passed over."""

import gzip
import json
import logging
import math

import pytest
import torch
from lavis.processors.blip_processors import BlipImageEvalProcessor, BlipQuestionProcessor

from lavis_kvmod.datasets.bad_samples import BadDataError, BadSamplePolicy
from lavis_kvmod.datasets.shards.builders import WdsVQABuilder
from lavis_kvmod.datasets.shards.counting import count_all, write_indices
from lavis_kvmod.datasets.shards.datasets import WdsVQAEvalData, WdsVQATrainData
from lavis_kvmod.datasets.shards.files import find_shards
from lavis_kvmod.datasets.shards.rows import CAPTION, VQA, rows_by_sample

SKIP = BadSamplePolicy("skip", 0.9)


def data(folder, policy=SKIP, cls=WdsVQAEvalData, **options):
    processors = BlipImageEvalProcessor(16), BlipQuestionProcessor()
    shards = find_shards([str(folder)])
    if cls is WdsVQAEvalData:
        shards = count_all(shards, VQA, policy, "val")
    return cls(*processors, shards, policy=policy, **options)


def rows_of(path, kind=VQA, **options):
    return [row for _, rows in rows_by_sample(path, kind, **options) for row in rows]


def problems_of(path, kind=VQA, **options):
    return [row.problem for row in rows_of(path, kind, **options) if row.problem]


def ids_and_bad(batches):
    batches = list(batches)
    return [i for b in batches for i in b["instance_id"]], [text for b in batches for text in b.get("bad_samples", [])]


# ------------------------------------------------------------ cut short


# Of a shard with two samples: between the blocks of its members, and inside them.
CUTS = [1, 511, 512, 700, 1024, 1536, 2048, 2500, 3584, 3600, 4096, 4608, 5000, 7168]


@pytest.mark.parametrize("kept", CUTS)
def test_a_shard_cut_anywhere_is_told_at_once(vqa_shards, kept):
    path = vqa_shards([2]) / "000.tar"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadDataError, match=r"000.tar: cut short: its \d+ bytes do not end as a tar does"):
        builder(train=path.parent, epoch_size=2).find()
    rows = rows_of(path)
    assert "cut short or damaged" in rows[-1].problem
    assert all(row.annotation["answer"] == [f"a{n}-0"] for n, row in enumerate(rows) if not row.problem)


def test_a_shard_cut_behind_its_last_sample_has_it(vqa_shards):
    """Only the end mark is gone: nobody can tell whether something came before it."""
    path = vqa_shards([2]) / "000.tar"
    path.write_bytes(path.read_bytes()[: 2 * 3584])  # four headers and their contents, in blocks of 512 bytes
    rows = rows_of(path)
    assert [bool(row.problem) for row in rows] == [False, False, True]


def test_with_an_index_the_size_tells(vqa_shards):
    folder = vqa_shards([2, 3])
    write_indices([str(folder)])
    path = folder / "001.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:4096])
    with pytest.raises(BadDataError, match=rf"001.tar: cut short: expected {size} bytes \(shards.json .*\), got 4096"):
        builder(val=folder).find()
    path.write_bytes(b"\0" * (size + 512))
    with pytest.raises(BadDataError, match="001.tar: changed: expected"):
        builder(val=folder, on_bad_sample="skip").build_datasets()["val"].make_loader(
            batch_size=9
        ).__iter__().__next__()


def test_what_a_cut_shard_has_lost_is_counted(vqa_shards, caplog):
    folder = vqa_shards([2, 6])
    write_indices([str(folder)])
    path = folder / "001.tar"
    path.write_bytes(path.read_bytes()[: 2 * 3584 + 600])  # two samples, and half a member
    with caplog.at_level(logging.WARNING):
        dataset = builder(val=folder, on_bad_sample="skip", max_bad_share=0.9).build_datasets()["val"]
    assert "001.tar: cut short" in caplog.text and "what is left of it is used" in caplog.text
    assert len(dataset) == 8
    ids, bad = ids_and_bad(dataset.make_loader(batch_size=3))
    assert len(ids) == 8
    good = {i for i in ids if i.startswith("p")}
    lost = {text.split(": ")[0] for text in bad}
    assert len(good) == len(lost) == 4
    assert f"{path}, row 6 of 6" in lost


def test_a_compressed_shard_cut_short(vqa_shards, tmp_path):
    whole = gzip.compress((vqa_shards([3]) / "000.tar").read_bytes())
    (tmp_path / "a.tar.gz").write_bytes(whole)
    assert not problems_of(tmp_path / "a.tar.gz") and len(rows_of(tmp_path / "a.tar.gz")) == 3
    for kept in (len(whole) // 2, len(whole) - 4):
        (tmp_path / "a.tar.gz").write_bytes(whole[:kept])
        assert "cut short or damaged" in problems_of(tmp_path / "a.tar.gz")[-1]


def test_what_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"not a tar " * 200)
    assert "cut short or damaged after 0 samples" in problems_of(tmp_path / "a.tar")[0]


# ------------------------------------------------------------ samples that cannot be used

GOOD = {"question": "what?", "answer": ["a"]}


@pytest.mark.parametrize(
    "members, problem",
    [
        (
            {"json": GOOD},
            r"expected one image, got 0 \(under its key there is json\); .* must stand together",
        ),
        ({"png": b"x"}, "there is an image, but no .json nor .txt under its key"),
        (
            {"png": b"x", "jpg": b"x", "json": GOOD},
            r"expected one image, got 2 \(.* there is jpg, json, png",
        ),
        ({"png": b"x", "json": b'{"question": '}, "its JSON cannot be read: Expecting value"),
        ({"png": b"x", "json": b"\xff\xfe{}"}, "its JSON cannot be read: 'utf-8' codec"),
        ({"png": b"x", "json": []}, "its JSON should hold an object, or a list of objects"),
        ({"png": b"x", "json": ["a"]}, "its JSON should hold an object, or a list of objects"),
        ({"png": b"x", "json": {"answer": ["a"]}}, r"expected a question .* got None among answer"),
        ({"png": b"x", "json": {"question": " ", "answer": ["a"]}}, r"expected a question .* got ' '"),
        ({"png": b"x", "json": {"question": "q", "answer": []}}, "it has no answer"),
        ({"png": b"x", "json": {"question": "q", "answer": ["", " "]}}, "all its answers are empty"),
        ({"png": b"x", "json": {"question": "q", "answer": [None]}}, "expected each answer to be a text, got None"),
        ({"png": b"x", "json": {**GOOD, "weight": [1, 2]}}, r"expected 1 weights, one for each answer, got \[1, 2\]"),
    ],
)
def test_a_sample_that_cannot_be_used_says_why(write_shard, tmp_path, members, problem):
    good = {"__key__": "b", "png": b"x", "json": GOOD}
    path = write_shard(tmp_path / "a.tar", [{"__key__": "a", **members}, good])
    first, second = rows_of(path, needs_target=True)
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(first.problem)
    assert first.annotation == {"instance_id": "a", "source": f"{path}, a"}
    assert second.problem is None


@pytest.mark.parametrize(
    "members, problem",
    [
        ({"png": b"x", "txt": b"  \n"}, "one of its captions is empty"),
        ({"png": b"x", "json": {"caption": ["a", ""]}}, "one of its captions is empty"),
        ({"png": b"x", "json": {"url": "u"}}, "it has no caption"),
        ({"png": b"x", "txt": b"\xff"}, "'utf-8' codec can't decode"),
    ],
)
def test_a_caption_that_cannot_be_used_says_why(write_shard, tmp_path, members, problem):
    path = write_shard(tmp_path / "a.tar", [{"__key__": "a", **members}])
    assert problem in problems_of(path, CAPTION, needs_target=True)[0]


def test_one_bad_question_among_good_ones_keeps_its_place(write_shard, tmp_path):
    path = write_shard(tmp_path / "a.tar", [{"__key__": "a", "png": b"x", "json": [GOOD, {}, GOOD]}])
    rows = rows_of(path)
    assert [row.annotation["instance_id"] for row in rows] == ["a#0", "a#1", "a#2"]
    assert [bool(row.problem) for row in rows] == [False, True, False]


def test_the_same_key_twice_in_a_shard(write_shard, tmp_path):
    samples = [{"__key__": key, "png": b"x", "json": GOOD} for key in ("a", "b", "a")]
    path = write_shard(tmp_path / "a.tar", samples)
    assert [row.problem for row in rows_of(path)] == [None, None, "its key has been used before in this shard"]
    neighbours = write_shard(tmp_path / "b.tar", [samples[0], samples[2]])
    assert "duplicate file name" in problems_of(neighbours)[0]


def test_raise_tells_all_that_is_wrong_with_what_is_evaluated(write_shard, vqa_shards, tmp_path):
    vqa_shards([3], folder=tmp_path)
    write_shard(tmp_path / "001.tar", [{"__key__": "x", "png": b"x"}, {"__key__": "y", "json": GOOD}])
    with pytest.raises(BadDataError) as told:
        builder(val=tmp_path).build_datasets()
    assert "2 of 5 samples of val cannot be used; mend them, or set on_bad_sample: skip" in str(told.value)
    assert "001.tar, x: there is an image" in str(told.value) and "001.tar, y: expected one image" in str(told.value)
    with pytest.raises(BadDataError, match="more than max_bad_share: 0.05"):
        builder(val=tmp_path, on_bad_sample="skip").build_datasets()
    builder(val=tmp_path, on_bad_sample="skip", max_bad_share=0.5).build_datasets()


# ------------------------------------------------------------ images that cannot be decoded


@pytest.fixture()
def broken_images(write_shard, picture, tmp_path):
    """Shards with 12 samples, of which 3, 4 and the last have no readable image."""
    for shard in range(2):
        samples = []
        for n in range(6 * shard, 6 * shard + 6):
            image = picture(n)[:300] if n in (3, 4, 11) else picture(n)
            samples.append({"__key__": f"k{n:02d}", "png": image, "json": {"question": "what?", "answer": [f"a{n}"]}})
        write_shard(tmp_path / f"{shard}.tar", samples)
    write_indices([str(tmp_path)])
    return tmp_path


def test_an_image_that_cannot_be_decoded_is_named(broken_images):
    loader = data(broken_images, BadSamplePolicy()).make_loader(batch_size=4, num_workers=1)
    with pytest.raises(BadDataError, match=r"0.tar, k03: not readable: .*; mend it, or set on_bad_sample: skip"):
        list(loader)


def test_skip_gives_the_next_that_can_be_read_and_tells_of_the_others(broken_images):
    for workers in (0, 2):
        batches = list(data(broken_images).make_loader(batch_size=4, num_workers=workers))
        ids, bad = ids_and_bad(batches)
        assert len(ids) == 12 and set(ids) == {f"k{n:02d}" for n in range(12)} - {"k03", "k04", "k11"}
        assert {text.split(": ")[0][-3:] for text in bad} == {"k03", "k04", "k11"}
        if workers == 0:
            # After the last comes the first.
            assert ids[3:6] == ["k05", "k05", "k05"] and ids[-1] == "k00"


def test_bad_samples_do_not_shift_what_comes_after_a_restart(broken_images):
    dataset = data(broken_images, cls=WdsVQATrainData, shuffle_buffer=4)

    def batches(start, workers):
        loader = dataset.make_loader(batch_size=2, num_workers=workers, seed=2)
        loader.set_epoch(1, start)
        return list(loader)

    for workers in (0, 2):
        whole = batches(0, workers)
        assert sum("bad_samples" in batch for batch in whole) >= 2
        for start in range(1, 6):
            for one, other in zip(batches(start, workers), whole[start:]):
                assert one["answer"] == other["answer"] and torch.equal(one["image"], other["image"])
                assert one.get("bad_samples") == other.get("bad_samples")


def test_nothing_but_bad_images_ends_with_an_error(write_shard, tmp_path):
    samples = [{"__key__": f"k{n}", "png": b"x", "json": GOOD} for n in range(5)]
    write_shard(tmp_path / "a.tar", samples)
    write_indices([str(tmp_path)])
    dataset = data(tmp_path, BadSamplePolicy("skip", 1.0), cls=WdsVQATrainData)
    with pytest.raises(BadDataError, match="6 samples in a row could not be read, more than max_bad_share"):
        list(dataset.make_loader(batch_size=2))


# ------------------------------------------------------------ which shards there are


def builder(cls=WdsVQABuilder, **given):
    from omegaconf import OmegaConf

    section = OmegaConf.load(cls.default_config_path()).datasets[f"wds_{cls.kind.name}"]
    splits = {split: {"storage": str(given.pop(split))} for split in ("train", "val", "test") if split in given}
    return cls(OmegaConf.merge(section, {"build_info": {"annotations": splits}, **given}))


def problems(**given):
    return "\n".join(WdsVQABuilder.config_problems(builder(**given).config))


def test_shards_that_are_missing_are_all_named_with_where_they_were_looked_for(vqa_shards):
    folder = vqa_shards([1, 1])
    told = problems(val=folder / "{000..003}.tar", train=folder / "x*.tar")
    assert "build_info.annotations.val.storage: no shards found under 2 of the names given" in told
    assert f"{folder}/002.tar (looked for {folder}/002.tar)" in told and "003.tar" in told and "/000.tar" not in told
    assert (
        f"build_info.annotations.train.storage: no shards found under 1 of the names given\n    {folder}/x*.tar" in told
    )


def test_a_relative_pattern_is_looked_for_here_and_in_the_cache(vqa_shards, tmp_path, monkeypatch):
    from lavis_kvmod.system.lavis_paths import set_registry_path

    folder = vqa_shards([1, 1])
    monkeypatch.chdir(folder.parent)
    assert [shard.path for shard in find_shards([f"{folder.name}/*.tar"])] == [folder / "000.tar", folder / "001.tar"]
    monkeypatch.chdir(tmp_path)
    from lavis.common.registry import registry

    before = registry.get_path("cache_root")
    try:
        set_registry_path("cache_root", folder.parent)
        assert [shard.path.name for shard in find_shards([folder.name])] == ["000.tar", "001.tar"]
        with pytest.raises(BadDataError, match=rf"\(looked for {tmp_path}/nowhere.* and {folder.parent}/nowhere"):
            find_shards(["nowhere/*.tar"])
    finally:
        set_registry_path("cache_root", before)


def test_a_shard_that_a_glob_no_longer_finds_is_missed(vqa_shards):
    folder = vqa_shards([1, 1, 1])
    write_indices([str(folder)])
    (folder / "001.tar").unlink()
    for pattern in (folder, folder / "*.tar", folder / "00?.tar"):
        assert f"1 shards of {folder}/shards.json are not there" in problems(val=pattern)
    assert problems(val=folder / "002.tar") == ""


def test_the_same_shard_given_twice(vqa_shards):
    folder = vqa_shards([1])
    with pytest.raises(BadDataError, match="000.tar: given twice"):
        find_shards([str(folder), str(folder / "000.tar")])


def test_a_key_that_two_shards_of_an_evaluation_have(vqa_shards, tmp_path):
    for folder in ("a", "b"):
        vqa_shards([2], folder=tmp_path / folder)
    shards = tmp_path / "{a,b}"
    with pytest.raises(BadDataError, match=r"val: 2 keys are in two shards; pack with.*\n.*p00000 in .*a/000"):
        builder(val=shards).build_datasets()
    write_indices([str(shards)])
    with pytest.raises(BadDataError, match="val: 2 keys are in two shards"):
        builder(val=shards).build_datasets()
    vqa_shards([2], folder=tmp_path / "c", prefix="q")
    assert len(builder(val=tmp_path / "{a,c}").build_datasets()["val"]) == 4


def test_training_without_an_index_or_a_size_says_what_to_do(vqa_shards):
    folder = vqa_shards([2])
    assert f"epoch_size: not set, and {folder} has no index" in problems(train=folder)
    assert f"lavis-kvmod pack --index {folder}" in problems(train=folder)
    assert problems(train=folder, epoch_size=10) == "" == problems(val=folder)


def test_options_are_checked_together(vqa_shards):
    told = problems(val=vqa_shards([1]), epoch_size=0, shuffle_buffer="big", on_bad_sample="ignore")
    assert "epoch_size: expected a whole number above 0, got 0" in told
    assert "shuffle_buffer: expected a whole number above 0, got 'big'" in told
    assert "on_bad_sample: expected raise or skip, got 'ignore'" in told


def test_no_shards_named():
    assert "names no shards; set build_info.annotations.train.storage" in problems()


@pytest.mark.parametrize("url", ["https://x.org/{0..9}.tar", "pipe:cat a.tar", "s3://bucket/a.tar"])
def test_what_is_not_on_this_machine(url):
    assert "expected a path on this machine" in problems(val=url)


def test_an_index_of_another_kind_or_that_cannot_be_read(vqa_shards):
    from lavis_kvmod.datasets.shards.builders import WdsCaptionBuilder

    folder = vqa_shards([1])
    (index,) = write_indices([str(folder)])
    with pytest.raises(BadDataError, match="its shards hold vqa data; use the builder wds_vqa"):
        builder(WdsCaptionBuilder, val=folder).find()
    contents = json.loads(index.read_text())
    index.write_text(json.dumps({**contents, "complete": False}))
    assert "lavis-kvmod pack has not finished here; run it again" in problems(val=folder)
    index.write_text(json.dumps({**contents, "version": 9}))
    assert "its version is 9, expected 1" in problems(val=folder)
    index.write_text("{")
    assert "expected the index that lavis-kvmod pack writes" in problems(val=folder)


@pytest.mark.parametrize(
    ("kind", "entry", "message"),
    [
        (VQA, {"question": "...", "answer": "red"}, "expected a question"),
        (VQA, {"question": "a \ud83d", "answer": "red"}, "half a character"),
        (VQA, {"question": "what?", "answer": "\ud83d"}, "half a character"),
        (VQA, {"question": "what?", "answer": "red", "weight": math.nan}, "weight: expected"),
        (VQA, {"question": "what?", "answer": "red", "weight": -1}, "weight: expected"),
        (VQA, {"question": "what?", "answer": ["red", "blue"], "weight": [0, 0]}, "all its weights are 0"),
        (CAPTION, {"caption": "!!!"}, "captions is empty"),
    ],
)
def test_an_entry_of_a_shard_that_no_model_can_take(kind, entry, message):
    with pytest.raises(ValueError, match=message):
        kind.parse(entry, None)


def test_lists_and_line_breaks_in_a_shards_texts():
    entry = {"question": "what\nis it?", "answer": "['dark\\nred' 'red']", "weight": "[0.5 0.25]"}
    expected = {"question": "what is it?", "answer": ["dark red", "red"], "weight": [0.5, 0.25]}
    assert VQA.parse(entry, None) == expected
    assert CAPTION.parse({"caption": "a red\r\nhouse"}, None) == {"caption": ["a red house"]}
    assert CAPTION.parse({}, "a red\nhouse") == {"caption": ["a red house"]}


def test_dots_in_a_key_are_told(write_shard, tmp_path):
    """webdataset's keys end at the first dot: these four are one sample with eight members."""
    samples = [{"__key__": f"photo.v{i}", "jpg": b"x", "txt": b"a house"} for i in range(4)]
    (problem,) = problems_of(write_shard(tmp_path / "a.tar", samples), CAPTION)
    assert "photo.v0.jpg has dots in its name: a key ends at the first; pack it under another name" in problem
    assert problem.endswith("such as photo_v0") and "stand together" not in problem


def test_a_brace_without_its_other_half_is_a_config_problem():
    with pytest.raises(BadDataError, match="brace without its other half"):
        find_shards(["train-{000..003.tar"])
