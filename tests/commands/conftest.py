"""What tests of several commands start from."""

import pytest
from omegaconf import OmegaConf
from PIL import Image
from skimage import data
from small_vit import SIZE

from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.weights import files as checkpoints


@pytest.fixture(scope="module")
def run_folder(model_config, tmp_path_factory):
    """A run's folder: a checkpoint of a small model, and the config it was made by; a picture beside it."""
    folder = tmp_path_factory.mktemp("run")
    processors = {"vis_processor": {"eval": {"name": "blip_image_eval", "image_size": SIZE}}}
    processors["text_processor"] = {"eval": {"name": "blip_question"}}
    section = model_config(num_prefix_tokens=3)
    cfg = {"model": section, "datasets": {"custom_vqa": processors}, "run": {"prompt": "Q: {} A:"}}
    OmegaConf.save(OmegaConf.create(cfg), folder / "config.yaml")
    model = Blip2OPTKVMod.from_config(section)
    trained = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
    checkpoints.save({"model": trained}, folder / "checkpoint_best.pth")
    Image.fromarray(data.chelsea()).save(folder / "cat.jpg")
    return folder
