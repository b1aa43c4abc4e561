"""What is packed is what is read again; a packing that was interrupted ends with the same bytes as one that was not."""

import json
import os
import tarfile

import numpy as np
import pytest
import skimage.data
import torch
from filelock import FileLock
from lavis.processors.blip_processors import BlipCaptionProcessor, BlipImageEvalProcessor, BlipQuestionProcessor
from PIL import Image

from lavis_kvmod.datasets.annotated import CaptionEvalData, CaptionTrainData, VQAEvalData, VQATrainData
from lavis_kvmod.datasets.bad_samples import BadDataError, BadSamplePolicy
from lavis_kvmod.datasets.shards.counting import count_all, write_indices
from lavis_kvmod.datasets.shards.datasets import (
    WdsCaptionEvalData,
    WdsCaptionTrainData,
    WdsVQAEvalData,
    WdsVQATrainData,
)
from lavis_kvmod.datasets.shards.files import find_shards, read_index
from lavis_kvmod.datasets.shards.packing import Item, Packer, PackSettings, items_of, readable
from lavis_kvmod.datasets.shards.rows import CAPTION, VQA

VISION, QUESTION, CAPTIONS = BlipImageEvalProcessor(16), BlipQuestionProcessor(), BlipCaptionProcessor()
CONTRACT = ("image_id", "question_id", "question", "question_type", "answer_type", "answer", "weight", "caption")


@pytest.fixture()
def photos(tmp_path, picture):
    """A folder of eleven pictures, PNG and JPEG."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = []
    for n in range(11):
        extension = "jpg" if n % 3 else "png"
        paths.append(folder / f"{n:02d}.{extension}")
        paths[-1].write_bytes(picture(n, extension))
    return paths


def questions(photos, cls=VQATrainData, per_photo=2):
    """A data set as our builders make it, with rows of an image far from each other."""
    rows = [
        {
            "image": str(path),
            "image_name": path.name,
            "image_id": n,
            "question_id": f"{n}-{q}",
            "question": f"What is {n}, asked {q}?",
            "question_type": "what",
            "answer": [f"a{n}", f"ä{q}"],
            "source": f"train.csv, row {q * len(photos) + n}",
        }
        for q in range(per_photo)
        for n, path in enumerate(photos)
    ]
    return cls(VISION, QUESTION, rows)


def pack(dataset, folder, answers=None, **settings):
    kind, items = items_of(dataset, "photos, train")
    options = {"name": "train", "prefix": "photos-train", "max_count": 4, **settings}
    return Packer(folder, kind, items, PackSettings(**options), answers).pack()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def members(folder):
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                yield member.name, tar.extractfile(member).read()


def read(cls, folder, text_processor=QUESTION):
    return cls(VISION, text_processor, find_shards([str(folder)])).make_loader(batch_size=4, num_workers=0)


# ------------------------------------------------------------ round trips


def test_questions_come_back_with_their_annotations_and_pixels(photos, tmp_path):
    dataset = questions(photos, VQAEvalData)
    pack(dataset, tmp_path / "out")
    expected = {row["question_id"]: (row, dataset[i]["image"]) for i, row in enumerate(dataset.annotation)}
    batches = list(read(WdsVQAEvalData, tmp_path / "out"))
    got = [(row, image) for batch in batches for row, image in zip(batch["annotation"], batch["image"])]
    assert len(got) == len(expected) == 22
    for row, image in got:
        original, pixels = expected[row["question_id"]]
        assert {k: row[k] for k in CONTRACT if k in row} == {k: original[k] for k in CONTRACT if k in original}
        assert row["image"] == original["image_name"]
        assert row["source"].endswith(f"(from {original['source']})")
        assert torch.equal(image, pixels)


def test_training_on_shards_sees_the_batches_of_training_on_files(photos, tmp_path):
    dataset = questions(photos)
    pack(dataset, tmp_path / "out")

    def samples(batches):
        found = {}
        for batch in batches:
            counts = batch["n_answers"].tolist()
            answers, weights = (list(torch.tensor(range(sum(counts))).split(counts)) for _ in range(2))
            for i, text in enumerate(batch["text_input"]):
                found[text] = (
                    batch["image"][i].tolist(),
                    [batch["answer"][k] for k in answers[i]],
                    batch["weight"][weights[i]].tolist(),
                )
        return found

    from_files = samples([dataset.collater([dataset[i] for i in range(len(dataset))])])
    assert samples(read(WdsVQATrainData, tmp_path / "out")) == from_files


def test_captions_come_back(photos, tmp_path):
    rows = [
        {"image": str(path), "image_id": path.stem, "caption": [f"photo {n}", f"no. {n}"], "source": "c.json"}
        for n, path in enumerate(photos)
    ]
    single = [{**row, "caption": [caption]} for row in rows for caption in row["caption"]]
    pack(CaptionTrainData(VISION, CAPTIONS, single), tmp_path / "train")
    texts = [text for batch in read(WdsCaptionTrainData, tmp_path / "train", CAPTIONS) for text in batch["text_input"]]
    assert sorted(texts) == sorted(CAPTIONS(caption) for row in rows for caption in row["caption"])

    pack(CaptionEvalData(VISION, CAPTIONS, rows), tmp_path / "val", seed=None)
    for folder in ("train", "val"):  # for evaluation an image is one sample, whatever it was packed from
        batches = list(read(WdsCaptionEvalData, tmp_path / folder, CAPTIONS))
        annotations = [annotation for batch in batches for annotation in batch["annotation"]]
        found = {annotation["image_id"]: annotation["caption"] for annotation in annotations}
        assert found == {row["image_id"]: row["caption"] for row in rows}
        assert len(annotations) == len(rows)
    index = read_index(tmp_path / "train")["shards"]["train-000000.tar"]
    assert (index.images, index.texts, index.targets) == (4, 8, 8)


def test_pictures_without_files_come_back_to_the_pixel(tmp_path):
    from lavis_kvmod.datasets.digits import DigitsVQAEvalDataset

    dataset = DigitsVQAEvalDataset(BlipImageEvalProcessor(56), QUESTION, "val")
    pack(dataset, tmp_path / "out", answers=dataset.answer_list, max_count=100)
    data = WdsVQAEvalData(BlipImageEvalProcessor(56), QUESTION, find_shards([str(tmp_path / "out")]))
    expected = {row["question_id"]: i for i, row in enumerate(dataset.annotation)}
    for batch in data.make_loader(batch_size=64):
        for row, image in list(zip(batch["annotation"], batch["image"]))[::16]:
            index = expected[row["question_id"]]
            original = dataset.annotation[index]
            assert {k: row[k] for k in CONTRACT if k in row} == {k: original[k] for k in CONTRACT if k in original}
            assert torch.equal(image, dataset[index]["image"])
    assert len(data) == len(dataset)


def test_lavis_own_data_sets_are_packed(photos, tmp_path):
    """Paths below vis_root, answers under other names, a single caption as a text, ids of NumPy's."""
    from lavis.datasets.datasets.vqa_datasets import VQADataset

    file = tmp_path / "okvqa.json"
    file.write_text(
        json.dumps([{"image": p.name, "question": "what?", "direct_answers": ["a", "b", "b"]} for p in photos])
    )
    dataset = VQADataset(VISION, QUESTION, str(photos[0].parent), [str(file)])
    dataset.annotation[0] = {**dataset.annotation[0], "image_id": np.int64(5)}
    kind, items = items_of(dataset, "okvqa, train")
    assert kind == VQA and [item.path for item in items] == [str(path) for path in photos]
    assert items[0].entries == [
        {
            "question": "what?",
            "image_id": 5,
            "image": "00.png",
            "answer": ["a", "b", "b"],
            "source": "okvqa, train, row 0",
        }
    ]
    assert items[1].entries[0]["image_id"] == "01.jpg"
    file.write_text(json.dumps([{"image": p.name, "caption": "a photo", "img_id": n} for n, p in enumerate(photos)]))
    kind, items = items_of(VQADataset(VISION, QUESTION, str(photos[0].parent), [str(file)]), "nocaps, val")
    assert kind == CAPTION and items[3].entries[0]["caption"] == ["a photo"] and items[3].entries[0]["image_id"] == 3


def test_images_keep_their_bytes_and_come_once(photos, tmp_path):
    pack(questions(photos), tmp_path / "out")
    images = [data for name, data in members(tmp_path / "out") if not name.endswith(".json")]
    assert sorted(images) == sorted(path.read_bytes() for path in photos)
    lists = [json.loads(data) for name, data in members(tmp_path / "out") if name.endswith(".json")]
    assert [len(entries) for entries in lists] == [2] * 11


@pytest.mark.parametrize("extension", ["webp", "jpg", "jpeg", "png", "bmp", "gif", "tif", "tiff"])
def test_each_format_comes_back_to_the_pixel(tmp_path, extension):
    """Compared with what Pillow reads from the file; webp also without loss, with what was saved."""
    photo = Image.fromarray(skimage.data.chelsea()).resize((24, 24))
    path = tmp_path / f"cat.{extension}"
    photo.save(path, **({"lossless": True} if extension == "webp" else {}))
    rows = [{"image": str(path), "image_id": 1, "question_id": 1, "question": "q?", "answer": ["a"], "source": "s"}]
    processor = BlipImageEvalProcessor(24, mean=(0, 0, 0), std=(1, 1, 1))
    pack(VQAEvalData(processor, QUESTION, rows), tmp_path / "out")
    assert dict(members(tmp_path / "out"))[f"photos-train-00000000.{extension}"] == path.read_bytes()
    (batch,) = WdsVQAEvalData(processor, QUESTION, find_shards([str(tmp_path / "out")])).make_loader(batch_size=1)
    got = (batch["image"][0] * 255).round().byte().permute(1, 2, 0).numpy()
    with Image.open(path) as saved:
        assert np.array_equal(got, np.asarray(saved.convert("RGB")))
    assert extension not in ("webp", "png", "bmp", "tif", "tiff") or np.array_equal(got, np.asarray(photo))


def test_an_image_under_a_name_without_a_known_extension(tmp_path, picture):
    for name, extension in (("photo", "jpg"), ("scan.IMG", "png"), ("b.JPEG", "jpg")):
        path = tmp_path / name
        path.write_bytes(picture(1, extension))
        rows = [{"image": str(path), "image_id": 1, "question": "q?", "answer": ["a"], "source": "s"}]
        pack(VQATrainData(VISION, QUESTION, rows), tmp_path / f"out {name}")
        names = [name for name, _ in members(tmp_path / f"out {name}")]
        assert f"photos-train-00000000.{'jpeg' if name == 'b.JPEG' else extension}" in names


def test_the_answers_to_choose_from_come_along(photos, tmp_path):
    from lavis_kvmod.datasets.shards.builders import WdsVQABuilder

    pack(questions(photos), tmp_path / "out", answers=["yes", "nein, ä"])
    config = {
        "data_type": "images",
        "build_info": {"annotations": {"val": {"storage": str(tmp_path / "out")}}},
    }
    from omegaconf import OmegaConf

    datasets = WdsVQABuilder(OmegaConf.create(config)).build_datasets()
    assert datasets["val"].answer_list == ["yes", "nein, ä"]
    (tmp_path / "out" / "answers.json").write_text('{"a": 1}')
    with pytest.raises(BadDataError, match="answers.json: expected a list of texts"):
        WdsVQABuilder(OmegaConf.create(config)).build_datasets()


# ------------------------------------------------------------ the same bytes, whatever happens


def test_the_order_is_shuffled_by_seed_or_kept(photos, tmp_path):
    def order(name, **settings):
        pack(questions(photos), tmp_path / name, **settings)
        jsons = [json.loads(data) for name, data in members(tmp_path / name) if name.endswith(".json")]
        return [entries[0]["image_id"] for entries in jsons]

    kept, first, again, other = (order(n, seed=seed) for n, seed in (("a", None), ("b", 1), ("c", 1), ("d", 2)))
    assert kept == list(range(11)) and first == again and len({tuple(o) for o in (kept, first, other)}) == 3
    assert sorted(first) == kept


def test_shards_are_closed_by_count_and_by_size(photos, tmp_path):
    by_count = pack(questions(photos), tmp_path / "count", max_count=4)
    assert [shard.contents.images for shard in by_count] == [4, 4, 3]
    assert [shard.path.name for shard in by_count] == [f"train-{i:06d}.tar" for i in range(3)]
    by_size = pack(questions(photos), tmp_path / "size", max_count=100, max_bytes=5000)
    assert len(by_size) == 3 and sum(shard.contents.images for shard in by_size) == 11
    assert all(5000 < shard.contents.bytes for shard in by_size[:-1])


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [0, 3, 4, 6, 10])
def test_an_interrupted_packing_goes_on_to_the_same_bytes(photos, tmp_path, monkeypatch, stop_at):
    pack(questions(photos), tmp_path / "whole", answers=["a"])
    reads, read_item = [], Item.read

    def stopping(self):
        if len(reads) == stop_at:
            raise _Stop
        reads.append(self.name)
        return read_item(self)

    monkeypatch.setattr(Item, "read", stopping)
    with pytest.raises(_Stop):
        pack(questions(photos), tmp_path / "out", answers=["a"])
    assert len(list((tmp_path / "out").glob("*.tar"))) == stop_at // 4  # whole shards alone
    assert not read_index(tmp_path / "out")["complete"]
    reads.clear()
    monkeypatch.setattr(Item, "read", lambda self: reads.append(self.name) or read_item(self))
    pack(questions(photos), tmp_path / "out", answers=["a"])
    assert len(reads) == 11 - stop_at // 4 * 4
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_second_call_finds_all_done_and_mends_what_was_damaged(photos, tmp_path, caplog):
    out = tmp_path / "out"
    pack(questions(photos), out)
    before = contents(out)
    pack(questions(photos), out)
    assert contents(out) == before
    damaged = out / "train-000001.tar"
    damaged.write_bytes(before[damaged.name][:-1] + b"\1")
    (out / ".train-000002.tar.77.tmp").write_bytes(b"left by a call that was killed")
    pack(questions(photos), out)
    assert "train-000001.tar is missing or damaged: it and what follows is packed anew" in caplog.text
    assert contents(out) == before


def test_a_source_that_has_changed_is_refused(photos, tmp_path):
    out = tmp_path / "out"
    pack(questions(photos), out)
    with pytest.raises(BadDataError, match="images or annotations have changed.*; remove the folder to pack anew"):
        pack(questions(photos, per_photo=3), out)
    with pytest.raises(BadDataError, match="max_count was 4 and is 5; seed was 42 and is None"):
        pack(questions(photos), out, max_count=5, seed=None)
    with pytest.raises(BadDataError, match="images or annotations have changed"):
        pack(questions(photos), out, answers=["other"])
    os.utime(photos[3], ns=(1, 1))
    with pytest.raises(BadDataError, match="images or annotations have changed"):
        pack(questions(photos), out)


def test_an_image_that_changes_meanwhile_is_refused(photos, tmp_path):
    _, items = items_of(questions(photos), "photos")
    photos[0].write_bytes(b"something else")
    with pytest.raises(BadDataError, match="00.png: changed while it was being packed"):
        items[0].read()


def test_a_folder_that_holds_something_else_is_refused(photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(BadDataError, match=r"expected a new or empty folder, got one that holds notes.txt"):
        pack(questions(photos), tmp_path / "out")
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}
    pack(questions(photos), tmp_path / "indexed")
    (tmp_path / "indexed" / "shards.json").unlink()
    write_indices([str(tmp_path / "indexed")])
    with pytest.raises(BadDataError, match="not of lavis-kvmod pack --cfg-path"):
        pack(questions(photos), tmp_path / "indexed")


def test_two_packings_into_one_folder(photos, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(str(tmp_path / "out" / ".lock")):
        with pytest.raises(BadDataError, match="another lavis-kvmod pack is writing here"):
            pack(questions(photos), tmp_path / "out")


# ------------------------------------------------------------ what cannot be packed


def test_all_that_is_missing_or_wrong_is_told_before_anything_is_written(photos, tmp_path):
    dataset = questions(photos)
    photos[2].unlink(), photos[5].unlink()
    dataset.annotation[0] = {**dataset.annotation[0], "question": " "}
    dataset.annotation[1] = {**dataset.annotation[1], "answer": []}
    with pytest.raises(BadDataError) as told:
        pack(dataset, tmp_path / "out")
    text = str(told.value)
    assert "photos, train: 2 of 11 images cannot be had\n    train.csv, row 2: " in text and "05.jpg" in text
    assert "2 of 22 annotations cannot be packed" in text and "train.csv, row 0: expected a question" in text
    assert "train.csv, row 1: it has no answer, where others have" in text
    assert not (tmp_path / "out").exists()


def test_rows_without_an_image_are_told(photos):
    """As those of LAVIS's sets of videos."""
    dataset = questions(photos)
    for i, row in enumerate(dataset.annotation):
        dataset.annotation[i] = {"video" if key == "image" else key: value for key, value in row.items()}
    with pytest.raises(
        BadDataError, match=r"22 of 22 annotations cannot be packed.*\n.*row 0: it names no image; it has"
    ):
        items_of(dataset, "msvd_qa, train")


def test_a_split_without_answers_is_packed(photos, tmp_path):
    dataset = questions(photos, VQAEvalData)
    for i, row in enumerate(dataset.annotation):
        dataset.annotation[i] = {key: value for key, value in row.items() if key != "answer"}
    pack(dataset, tmp_path / "out")
    batch = next(iter(read(WdsVQAEvalData, tmp_path / "out")))
    assert "answer" not in batch and "answer" not in batch["annotation"][0]


def test_images_are_decoded_first_if_asked(photos, tmp_path):
    photos[4].write_bytes(photos[4].read_bytes()[:200])
    _, items = items_of(questions(photos), "photos")
    with pytest.raises(BadDataError, match=r"1 of 11 images of photos cannot be used.*\n.*train.csv, row 4: .*04.jpg"):
        readable(items, BadSamplePolicy(), "photos")
    assert len(readable(items, BadSamplePolicy("skip", 0.2), "photos")) == 10


@pytest.mark.parametrize("name", ["a.b", "a/b", "_a", ""])
def test_names_that_keys_cannot_have(name):
    with pytest.raises(ValueError, match="prefix: expected a name without dots"):
        PackSettings("train", name)


# ------------------------------------------------------------ shards of others


def test_shards_as_laion_has_them(write_shard, picture, tmp_path):
    """KEY.jpg, KEY.txt and KEY.json with more than is needed; without an index."""
    samples = [
        {
            "__key__": f"{n:09d}",
            "jpg": picture(n, "jpg"),
            "txt": f"photo {n}",
            "json": {"url": "u", "status": "success", "caption": None if n % 2 else f"caption {n}", "width": 24},
        }
        for n in range(6)
    ]
    write_shard(tmp_path / "00000.tar", samples)
    data = WdsCaptionTrainData(VISION, CAPTIONS, find_shards([str(tmp_path)]), epoch_size=6)
    texts = {text for batch in data.make_loader(batch_size=4) for text in batch["text_input"]}
    assert texts == {f"photo {n}" if n % 2 else f"caption {n}" for n in range(6)}
    shards = count_all(find_shards([str(tmp_path)]), CAPTION, BadSamplePolicy(), "val")
    assert len(WdsCaptionEvalData(VISION, CAPTIONS, shards)) == 6


def test_an_index_for_shards_of_others(vqa_shards, write_shard, picture, tmp_path):
    folder = vqa_shards([2, 3], questions=2)
    (path,) = write_indices([str(folder / "*.tar")])
    index = read_index(folder)
    assert path == folder / "shards.json" and index["kind"] == "vqa" and index["complete"]
    assert [(c.images, c.texts, c.first_key) for c in index["shards"].values()] == [(2, 4, "p00000"), (3, 6, "p00002")]
    with pytest.raises(BadDataError, match=r"there is an index already; remove it to write it anew"):
        write_indices([str(folder)])
    write_shard(
        tmp_path / "a.tar", [{"__key__": "a", "png": picture(0), "txt": "a photo"}, {"__key__": "b", "txt": "b"}]
    )
    with pytest.raises(BadDataError, match=r"1 of 2 samples cannot be used.*\n.*a.tar, b: expected one image, got 0"):
        write_indices([str(tmp_path)])
    write_indices([str(tmp_path)], skip_bad=True)
    assert read_index(tmp_path)["kind"] == "caption"
