"""What a run file can name, listed."""

import json
import re

import pytest

from lavis_kvmod.commands import cli
from lavis_kvmod.commands.list import SECTIONS


def listed(capsys, *argv, status=0):
    assert cli.main(["list", *argv]) == status
    return capsys.readouterr().out


def test_everything_that_has_a_name(capsys):
    out = re.sub(r"(?<=\S) {2,}", "  ", listed(capsys))  # whatever the columns' widths
    for name in (
        "blip2_opt_kvmod pretrain_opt2.7b  the default",
        "blip2_opt_kvmod demo",
        "  eva_clip_g  EVA-CLIP-G without its last block",
        "  efficientnet-b3",
        "  timm:NAME",
        "  qformer",
        "  kvmod_captioning",
        "  custom_vqa  rows with an image, a question",
        "  CIDEr",
        "  projects/kvmod/demo_vqa.yaml",
    ):
        assert name in out
    assert "captioning\n" not in out and "coco_vqa" not in out  # LAVIS's own are found by a pattern
    as_json = json.loads(listed(capsys, "--json"))
    assert list(as_json) == list(SECTIONS) and all(as_json.values())


def test_a_section_and_a_pattern(capsys):
    import timm

    found = listed(capsys, "auxiliary", "timm:*b3*").split()
    assert found == [f"timm:{name}" for name in timm.list_models("*b3*")]
    assert listed(capsys, "auxiliary", "*-b[67]").split() == ["efficientnet-b6", "efficientnet-b7"]
    assert json.loads(listed(capsys, "image-encoders", "e*", "--json")) == {"image-encoders": ["eva_clip_g"]}
    assert [line.split()[0] for line in listed(capsys, "tasks", "*captioning").splitlines()] == [
        "captioning",
        "kvmod_captioning",
    ]
    assert listed(capsys, "models", "*_kvmod *6.7b").splitlines() == [
        "blip2_opt_kvmod pretrain_opt6.7b",
        "blip2_opt_kvmod caption_coco_opt6.7b",
    ]
    assert "no name fits x*" in listed(capsys, "metrics", "x*", status=1)
    with pytest.raises(SystemExit):
        cli.main(["list", "nothing"])
    assert "choose from" in capsys.readouterr().err
