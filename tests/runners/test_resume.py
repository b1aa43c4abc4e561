"""A run that is killed and resumed ends as one that never was: parameters bit for bit, and its log."""

import random
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lavis_kvmod.commands.train import train
from lavis_kvmod.models.settings import Stage1Settings
from lavis_kvmod.weights import files as checkpoints

LAST = "checkpoint_last.pth"


@pytest.mark.slow
def test_killed_in_the_middle_of_an_epoch(write_run, in_process, runs, killed_before_step, assert_same_run):
    """With workers, accumulation, random crops, dropout and drawn answers. 7 batches an epoch make 4 steps: step 6 is
    in the second epoch, and the checkpoint before it too."""
    options = dict(num_workers=2, accum_grad_iters=2, save_every_n_iters=2, resume_ckpt_path="auto")
    path = write_run(**options)
    assert in_process(lambda: train(path), "whole")[0] == 0
    assert in_process(killed_before_step(path, 6), "killed")[0] == -signal.SIGKILL
    (folder,) = runs("killed")
    saved = checkpoints.read(folder / LAST)
    assert (saved["epoch"], saved["state"]["batch"]) == (1, 4)
    code, output = in_process(lambda: train(path), "killed")
    assert code == 0, output
    assert runs("killed") == [folder] and "at epoch 1, batch 4" in output
    assert_same_run(folder, runs("whole")[0])


@pytest.mark.slow
def test_killed_while_data_sets_are_mixed(write_run, in_process, runs, killed_before_step, assert_same_run):
    """Pictures and shards, in epochs of 5 batches, of which 12 make the run: the third epoch has 2."""
    options = dict(save_every_n_iters=1, max_iters=12, iters_per_inner_epoch=5, resume_ckpt_path="auto")
    mixed = OmegaConf.load(write_run(train_dataset_ratios={"coco_vqa": 2, "wds_vqa": 1}, **options))
    shards = OmegaConf.load(write_run(dataset="wds_vqa", name="shards.yaml")).datasets.wds_vqa
    del shards.build_info.annotations["val"]
    mixed.datasets.wds_vqa = shards
    path = str(Path("mixed.yaml").resolve())
    OmegaConf.save(mixed, path)
    code, output = in_process(lambda: train(path), "whole")
    assert code == 0, output
    (whole,) = runs("whole")
    last = checkpoints.read(whole / LAST)
    assert last["epoch"] == 2 and last["optimizer"]["state"][0]["step"] == 12
    assert in_process(killed_before_step(path, 7), "killed")[0] == -signal.SIGKILL
    code, output = in_process(lambda: train(path), "killed")
    assert code == 0 and "at epoch 1, batch 2" in output, output
    assert_same_run(runs("killed")[0], whole)


@pytest.mark.slow
def test_killed_in_stage_1_with_its_momentum(
    write_run, model_config, in_process, runs, killed_before_step, assert_same_run
):
    """All four objectives; the momentum model and the queue, which goes round within the second epoch, go on, too."""
    sizes = {key: value for key, value in model_config().items() if key in Stage1Settings.model_fields}
    sizes.update(arch="blip2_kvmod", model_type="pretrain", bert_model="demo", from_bert=False, pretrained=None)
    sizes.update(objectives={"itc": 1, "itm": 1, "itg": 1, "mlm": 1}, momentum={"queue": 30}, load_finetuned=False)
    size = {"name": "blip_image_train", "image_size": 28}
    data = {"digits_caption": {"train_scans": 24, "vis_processor": {"train": size, "eval": size}}}
    run = dict(OmegaConf.load(write_run(save_every_n_iters=2, batch_size_train=4, resume_ckpt_path="auto")).run)
    run.update(task="kvmod_pretrain", valid_splits=[])
    del run["num_beams"], run["max_len"]
    path = str(Path("stage1.yaml").resolve())
    OmegaConf.save(OmegaConf.create({"model": sizes, "datasets": data, "run": run}), path)
    code, output = in_process(lambda: train(path), "whole")
    assert code == 0, output
    last = checkpoints.read(runs("whole")[0] / LAST)
    assert any("queue" in name for name in last["model"]) and any("momentum" in name for name in last["model"])
    assert in_process(killed_before_step(path, 9), "killed")[0] == -signal.SIGKILL
    code, output = in_process(lambda: train(path), "killed")
    assert code == 0 and "at epoch 1, batch 2" in output, output
    assert_same_run(runs("killed")[0], runs("whole")[0])


@pytest.mark.slow
def test_the_comparison_notices(write_run, in_process, runs, assert_same_run):
    """The same run with another seed is another run: dropout, crops and answers are drawn."""
    path = write_run(max_epoch=1, valid_splits=[])
    in_process(lambda: train(path), "one")
    in_process(lambda: train(path), "same")
    in_process(lambda: train(path, ["run.seed=7"]), "other")
    assert_same_run(runs("one")[0], runs("same")[0])
    with pytest.raises(AssertionError):
        assert_same_run(runs("one")[0], runs("other")[0])


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["coco_vqa", "wds_vqa"])
@pytest.mark.parametrize("seed", range(6))
def test_killed_anywhere(write_run, in_process, runs, killed_before_step, assert_same_run, seed, dataset):
    """Random settings, killed twice at random steps, resumed by path or by itself."""
    choose = random.Random(seed)
    options = dict(
        num_workers=choose.choice([0, 2]),
        accum_grad_iters=choose.choice([1, 2, 3]),
        save_every_n_iters=choose.choice([1, 2, 3]),
        keep_last=choose.choice([1, 2, 3]),
        max_epoch=3,
        dataset=dataset,
        # without crops equal images are encoded once, then remembered; a resumed run encodes them in other batches
        model={"cache_frozen_features": True} if seed % 2 else {},
        crops="blip_image_eval" if seed % 2 else "blip_image_train",
    )
    path = write_run(**options)
    assert in_process(lambda: train(path), "whole")[0] == 0
    steps = 3 * -(-7 // options["accum_grad_iters"])
    resume = []
    for _ in range(2):
        code, output = in_process(killed_before_step(path, choose.randrange(steps), resume), "killed")
        assert code in (0, -signal.SIGKILL), output
        if choose.random() < 0.5:
            resume = ["run.resume_ckpt_path=auto"]
        else:
            with_checkpoint = [folder for folder in runs("killed") if (folder / LAST).exists()]
            resume = [f"run.resume_ckpt_path={with_checkpoint[-1] / LAST}"] if with_checkpoint else []
    code, output = in_process(lambda: train(path, resume), "killed")
    assert code == 0, output
    finished = [folder for folder in runs("killed") if (folder / LAST).exists()]
    assert_same_run(finished[-1], runs("whole")[0])
