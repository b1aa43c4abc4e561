"""Features of frozen encoders on disk: written once, gone on with, read, and refused where they do not belong."""

import pytest
import torch
from whole_runs import write_run  # noqa: F401

from lavis_kvmod.commands import cache_features as command
from lavis_kvmod.commands import cli
from lavis_kvmod.commands.train import train
from lavis_kvmod.models.vision import feature_files
from lavis_kvmod.models.vision.feature_cache import FrozenFeatures
from lavis_kvmod.models.vision.feature_files import FeatureFiles, FeatureFilesError, FeatureWriter
from lavis_kvmod.weights import files as checkpoints

OPTION = "model.feature_cache_dir=features"


def test_a_training_from_files_is_the_one_without(write_run, tmp_path, monkeypatch, capsys):  # noqa: F811
    path = write_run(crops="blip_image_eval", max_epoch=1, valid_splits=[])
    monkeypatch.setattr(feature_files, "SHARD", 5)
    assert cli.main(["cache-features", "--cfg-path", path, "--options", OPTION]) == 0
    assert "features of 13 images, " in capsys.readouterr().out
    shards = sorted((tmp_path / "features").glob("*.safetensors"))
    assert len(shards) == 3

    shards[0].unlink()  # as after a kill
    shards[2].write_bytes(shards[2].read_bytes()[:-1] + b"\x7f")  # and a bad disk
    encoded = []
    monkeypatch.setattr(command, "_write", lambda *args, real=command._write: encoded.extend(args[2]) or real(*args))
    assert cli.main(["cache-features", "--cfg-path", path, "--options", OPTION]) == 0
    assert len(encoded) == 8 and "features of 13 images, " in capsys.readouterr().out

    calls = []
    from lavis_kvmod import Blip2OPTKVMod

    monkeypatch.setattr(
        Blip2OPTKVMod, "_encode_image", lambda *args, real=Blip2OPTKVMod._encode_image: calls.append(1) or real(*args)
    )
    for name, options in (("kept", ["model.cache_frozen_features=true"]), ("read", [OPTION])):
        calls.clear()
        train(path, [f"run.output_dir={name}", *options])
        assert bool(calls) == (name != "read")
    # What is kept in memory is what is computed anew, to 1e-6 (tests/models/test_blip2_opt_kvmod.py).
    kept, read = (checkpoints.read(next(tmp_path.glob(f"{name}/*/checkpoint_last.pth"))) for name in ("kept", "read"))
    assert all(torch.equal(value, read["model"][key]) for key, value in kept["model"].items())

    other = ["model.image_size=56", "datasets.coco_vqa.vis_processor.train.image_size=56"]
    other += ["datasets.coco_vqa.vis_processor.eval.image_size=56"]
    with pytest.raises(
        FeatureFilesError, match=r"of other encoders than the model's \(visual_encoder, .*another image"
    ):
        train(path, [OPTION, *other])


def test_what_cannot_be_kept_is_told(write_run, tmp_path, capsys):  # noqa: F811
    path = write_run(max_epoch=1)
    assert cli.main(["cache-features", "--cfg-path", path]) == 2
    assert "model.feature_cache_dir: expected a folder to write to, got none" in capsys.readouterr().err
    assert cli.main(["cache-features", "--cfg-path", path, "--options", OPTION]) == 2
    assert "set its vis_processor to blip_image_eval" in capsys.readouterr().err
    assert cli.main(["cache-features", "--cfg-path", path, "--options", OPTION, "--splits", "no"]) == 2
    assert "no data set has a split 'no'; there are" in capsys.readouterr().err
    with pytest.raises(FeatureFilesError, match=r"expected features of images in .*absent, got no about.json there"):
        train(path, ["model.feature_cache_dir=absent"])


def test_several_ranks_write_beside_each_other_and_a_model_without_prefix_reads_them(tmp_path):
    own = {"visual_encoder": "a", "ln_vision": "b", "aux_encoder": "c"}
    for rank in (0, 1):
        writer = FeatureWriter(tmp_path, own, rank)
        tokens = torch.arange(6.0).view(2, 3, 1) + 10 * rank
        writer.add([f"{rank}-0", f"{rank}-1"], FrozenFeatures(tokens.half(), torch.full((2, 4), float(rank))))
        writer.flush()
        writer.flush()  # nothing has come since
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    files = FeatureFiles(tmp_path, own)
    assert len(files) == 4 and "1-1" in files and files.get("2-0") is None
    visual, pooled = files.get("1-1")
    assert visual.dtype is torch.float16 and visual.flatten().tolist() == [13, 14, 15] and pooled.tolist() == [1] * 4
    plain = FeatureFiles(tmp_path, {"visual_encoder": "a", "ln_vision": "b"})
    assert plain.get("0-0").pooled is None
    for wrong in ({**own, "aux_encoder": "d"}, {"visual_encoder": "x"}):
        with pytest.raises(FeatureFilesError, match="other encoders"):
            FeatureFiles(tmp_path, wrong)
        with pytest.raises(FeatureFilesError, match="other encoders"):
            FeatureWriter(tmp_path, wrong)
    cut = next(tmp_path.glob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-8])
    with pytest.raises(FeatureFilesError, match="cannot be read .* writes damaged files anew"):
        FeatureFiles(tmp_path, own)
