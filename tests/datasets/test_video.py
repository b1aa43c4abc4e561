"""Frames of videos, which the tests write themselves."""

import json
from fractions import Fraction

import numpy as np
import pytest

from lavis_kvmod.commands.train import train
from lavis_kvmod.datasets.custom import CustomVQABuilder
from lavis_kvmod.datasets.images import BadImageError
from lavis_kvmod.datasets.video import header_problem, read_frames

av = pytest.importorskip("av")


def write_video(path, frames, rate=4, gop=12):
    """Grey pictures, each 10 levels lighter than the one before; or of these levels."""
    levels = [i % 25 for i in range(frames)] if isinstance(frames, int) else frames
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.gop_size = "yuv420p", gop
        for level in levels:
            picture = np.full((64, 64, 3), 10 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def levels(found):
    return [round(np.asarray(frame).mean() / 10) for _, frame in found]


def test_frames_are_the_middles_of_equal_parts(tmp_path):
    video = str(write_video(tmp_path / "a.mp4", 24))
    assert levels(read_frames(video, 4)) == [3, 9, 15, 21]
    assert [time for time, _ in read_frames(video, 4)] == [0.75, 2.25, 3.75, 5.25]
    assert levels(read_frames(video, 12)) == list(range(1, 24, 2))


def test_a_short_video_gives_what_it_has(tmp_path):
    assert levels(read_frames(str(write_video(tmp_path / "a.mp4", 3)), 8)) == [0, 1, 2]


class Counting:
    """A container that counts the frames it decodes."""

    decoded = 0

    def __init__(self, inner):
        self.inner = inner

    def __enter__(self):
        self.inner.__enter__()
        return self

    def __exit__(self, *error):
        return self.inner.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def decode(self, *streams):
        for frame in self.inner.decode(*streams):
            Counting.decoded += 1
            yield frame


def test_a_video_of_hours_is_not_decoded_whole(tmp_path, monkeypatch):
    video = str(write_video(tmp_path / "long.mp4", 3600, rate=1, gop=25))  # an hour, a key frame each 25 s
    opened = av.open
    monkeypatch.setattr(av, "open", lambda path: Counting(opened(path)))
    assert len(read_frames(video, 8)) == 8
    assert 8 <= Counting.decoded <= 8 * 27


SCENES = [0] * 30 + [10] * 3 + [20] * 15  # 12 s at four a second, of which one scene takes less than a second


def test_frames_by_scene_miss_no_short_one(tmp_path):
    video = str(write_video(tmp_path / "a.mp4", SCENES))
    assert levels(read_frames(video, 3)) == [0, 0, 20]
    assert levels(read_frames(video, 3, by="scene")) == [0, 10, 20]
    times = [time for time, _ in read_frames(video, 3, by="scene")]
    assert 3 < times[0] < 4.5 and 7.5 <= times[1] < 8.25 and 9.5 < times[2] < 10.5
    assert levels(read_frames(video, 4, by="scene")).count(0) == 2  # no fourth scene: the longest is halved


def test_a_video_of_one_scene_or_few_frames_gives_evenly_spaced_ones(tmp_path):
    still = str(write_video(tmp_path / "still.mp4", [7] * 32))
    assert [time for time, _ in read_frames(still, 4, by="scene")] == pytest.approx([0.875, 2.875, 4.875, 6.875])
    assert levels(read_frames(str(write_video(tmp_path / "a.mp4", 3)), 8, by="scene")) == [0, 1, 2]


def test_scenes_of_ten_hours_are_not_decoded_whole(tmp_path, monkeypatch):
    video = str(write_video(tmp_path / "long.mp4", 3600, rate=Fraction(1, 10), gop=25))
    opened = av.open
    monkeypatch.setattr(av, "open", lambda path: Counting(opened(path)))
    monkeypatch.setattr(Counting, "decoded", 0)
    times = [time for time, _ in read_frames(video, 4, by="scene")]
    assert len(times) == 4 and times[-1] > 3600
    assert Counting.decoded <= 9 * 4 * 27


@pytest.fixture()
def bad(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir(exist_ok=True)
    whole = write_video(tmp_path / "whole.mkv", 24)
    write_video(folder / "one.mp4", 1)
    (folder / "cut.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "empty.mp4").write_bytes(b"")
    with av.open(str(folder / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    return folder


def test_what_is_no_video_is_told_by_its_header(bad):
    for name, told in (
        ("one.mp4", "one frame; name a picture"),
        ("empty.mp4", "not readable as a video"),
        ("sound.wav", "no frames"),
    ):
        assert told in header_problem(str(bad / name))


def test_a_video_that_was_cut_short_is_told_where(bad):
    with pytest.raises(
        BadImageError, match=r"cut.mkv: cut short or broken: no frame at .* s, and its header says 6.0 s"
    ):
        read_frames(str(bad / "cut.mkv"), 8)


def test_rows_of_videos(tmp_path, bad, section_of, write_csv):
    write_video(bad / "good.mp4", 24)
    rows = [
        {"video": name, "question": "What is it?", "answer": "grey"} for name in ("good.mp4", "one.mp4", "sound.wav")
    ]
    info = {"images": {"storage": str(bad)}, "annotations": {"train": {"storage": str(write_csv("v.csv", rows))}}}
    section = section_of(CustomVQABuilder, build_info=info, frames=4, frames_by="scene")
    (told,) = CustomVQABuilder.config_problems(section)
    assert "2 of 3 rows of train (2 × bad video)" in told
    assert "v.csv, row 3:" in told and "v.csv, row 4:" in told
    section.update(on_bad_sample="skip", max_bad_share=0.9)
    data = CustomVQABuilder(section).build_datasets()["train"]
    assert data[0]["image"].shape == (4, 3, 28, 28)
    assert data.image_of(0).endswith("good.mp4")
    section.update(frames_by="scenes")
    (told,) = CustomVQABuilder.config_problems(section)
    assert "frames_by: expected uniform or scene, got 'scenes'" in told


def test_a_run_over_videos(run_file, write_csv, tmp_path):
    for name, frames in (("a.mp4", 24), ("b.mp4", 2)):
        write_video(tmp_path / "photos" / name, frames)
    rows = [{"clip": name, "question": "What comes after?", "answer": "grey"} for name in ("a.mp4", "b.mp4", "a.mp4")]
    table = write_csv("v.csv", rows)
    files = {"annotations": {split: {"storage": str(table)} for split in ("train", "val")}}
    section = {"build_info": files, "columns": {"video": "clip"}, "frames": 4}
    train(run_file("custom_vqa", section, test_splits=[]), ["model.max_images=4", "model.cache_frozen_features=true"])
    (found,) = tmp_path.glob("output/*/result/val*.json")
    assert len(json.loads(found.read_text())) == 3
