"""LAVIS's own BLIP-2 OPT run files with one word changed, through LAVIS's own tasks and data set classes.

Sizes, files and the device are overridden (the machine is small), the structure is theirs.
"""

import json
import shutil
from pathlib import Path

import lavis
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis_kvmod.commands.evaluate import evaluate
from lavis_kvmod.commands.train import train
from lavis_kvmod.models.settings import Stage1Settings
from lavis_kvmod.system.lavis_paths import set_registry_path
from lavis_kvmod.weights import files as checkpoints
from lavis_kvmod.weights import reading

PROJECTS = Path(lavis.__file__).parent / "projects" / "blip2"
RUN_FILES = sorted(p for p in PROJECTS.rglob("*.yaml") if "arch: blip2_opt" in p.read_text())


def test_there_are_run_files_to_try():
    assert {p.name for p in RUN_FILES} == {
        "caption_coco_ft.yaml",
        "caption_coco_opt2.7b_eval.yaml",
        "caption_coco_opt6.7b_eval.yaml",
        "pretrain_stage2.yaml",
    }


@pytest.fixture()
def cache(tmp_path, monkeypatch):
    """LAVIS's cache root with COCO captions in the Karpathy layout, and Visual Genome's: four pictures."""
    from lavis.common.registry import registry

    root = tmp_path / "cache"
    before = registry.get_path("cache_root")
    set_registry_path("cache_root", root)
    monkeypatch.chdir(tmp_path)
    images = root / "coco/images/val2014"
    images.mkdir(parents=True)
    names = [f"val2014/COCO_val2014_{i:012}.jpg" for i in range(1, 5)]
    for i, name in enumerate(names):
        Image.new("RGB", (48, 40 + i), (60 * i, 120, 200 - 40 * i)).save(root / "coco/images" / name)
    captions = ["a cat on a mat", "a photo of a mat", "a cat", "the ink is red"]
    annotations = root / "coco/annotations"
    annotations.mkdir()
    rows = [{"image": n, "caption": c, "image_id": f"coco_{i}"} for i, (n, c) in enumerate(zip(names, captions))]
    (annotations / "coco_karpathy_train.json").write_text(json.dumps(rows))
    evaluated = [{"image": n, "caption": [c, c]} for n, c in zip(names, captions)]
    for split in ("val", "test"):
        (annotations / f"coco_karpathy_{split}.json").write_text(json.dumps(evaluated))
    shutil.copytree(images, root / "vg/images/val2014")
    (root / "vg/annotations").mkdir()
    (root / "vg/annotations/vg_caption.json").write_text(json.dumps(rows))
    yield root
    set_registry_path("cache_root", before)


@pytest.fixture()
def finetuned(build, tmp_path):
    """A checkpoint as LAVIS's caption_coco ones: the ViT was trained too."""
    model = build(kv_modulation=False, freeze_vit=False)
    checkpoints.save({"model": checkpoints.trained_state_dict(model)}, tmp_path / "finetuned.pth")
    return tmp_path / "finetuned.pth"


@pytest.fixture()
def small(model_config, finetuned):
    """Overrides of sizes, files and device."""
    sizes = model_config()
    for key in ("arch", "load_finetuned"):
        del sizes[key]
    options = [f"model.finetuned={finetuned}", "run.device=cpu", "run.num_workers=0", "run.max_epoch=1"]
    for key, value in sizes.items():
        if key.endswith("geometry"):
            options += [f"model.{key}.{name}={size}" for name, size in value.items()]
        else:
            options.append(f"model.{key}={value}")
    return options


def one_word_changed(path: Path, tmp_path: Path, arch: str = "blip2_opt") -> str:
    text = path.read_text()
    assert text.count(f"arch: {arch}\n") == 1
    changed = tmp_path / path.name
    changed.write_text(text.replace(f"arch: {arch}\n", f"arch: {arch}_kvmod\n"))
    return str(changed)


@pytest.mark.parametrize(
    "name",
    ["caption_coco_ft", "caption_coco_opt2.7b_eval", pytest.param("caption_coco_opt6.7b_eval", marks=pytest.mark.slow)],
)
def test_captioning_files_of_the_wheel(name, small, cache, tmp_path, finetuned):
    (path,) = [p for p in RUN_FILES if p.stem == name]
    # LAVIS's caption metrics need Java and a download; predictions do not.
    size = ["run.report_metric=false", "run.max_len=6", "run.num_beams=2"]
    size.append("datasets.coco_caption.vis_processor.eval.image_size=28")
    if "ft" in path.stem:
        size.append("datasets.coco_caption.vis_processor.train.image_size=28")
    run = train if "ft" in path.stem else evaluate
    logs = run(one_word_changed(path, tmp_path), [*small, *size])
    assert logs["test"]["agg_metrics"] >= 0
    (folder,) = (tmp_path / "output/BLIP2").glob("*/*")
    (result,) = (folder / "result").glob("test_epochbest.json")
    assert [row["image_id"] for row in json.loads(result.read_text())] == [1, 2, 3, 4]
    if run is train:  # a recipe that trains the ViT saves it
        saved = checkpoints.read(folder / "checkpoint_last.pth")["model"]
        before = checkpoints.read(finetuned)["model"]
        assert not torch.equal(saved["visual_encoder.cls_token"], before["visual_encoder.cls_token"])


def test_stage_2_from_a_stage_1_checkpoint(small, cache, tmp_path, build, files):
    """A stage-1 file has a text side and no projection; what BLIP-2 OPT does not have is left out."""
    (path,) = [p for p in RUN_FILES if p.stem == "pretrain_stage2"]
    state = reading.read_weights(files.blip2)
    stage_1 = {key: value for key, value in state.items() if not key.startswith("opt_proj.")}
    for key, value in state.items():
        if "_query" in key:
            stage_1[key.replace("_query", "")] = value
    for key in ("Qformer.cls.predictions.bias", "itm_head.weight", "itm_head.bias", "vision_proj.weight", "temp"):
        stage_1[key] = torch.zeros(2)
    checkpoints.save({"model": stage_1}, tmp_path / "stage1.pth")
    size = [f"model.pretrained={tmp_path / 'stage1.pth'}", "datasets.vg_caption.vis_processor.train.image_size=28"]
    size.append("datasets.coco_caption.vis_processor.train.image_size=28")
    train(one_word_changed(path, tmp_path), [*small, *size])
    (last,) = (tmp_path / "output/BLIP2/Pretrain_stage2").glob("*/checkpoint_last.pth")
    assert "opt_proj.weight" in checkpoints.read(last)["model"]


def test_stage_2_goes_on_from_stage_2_and_says_so(build, files, tmp_path, caplog):
    first = build()
    ours = tmp_path / "ours.pth"
    checkpoints.save({"model": checkpoints.trained_state_dict(first)}, ours)
    with caplog.at_level("INFO"):
        second = build(load_finetuned=True, finetuned=str(ours))  # ln_vision from `pretrained`
    assert "blip2.pth (of stage 2, with its opt_proj)" in caplog.text  # LAVIS's, and then ours
    assert "ours.pth (of stage 2, with its opt_proj)" in caplog.text
    assert torch.equal(second.opt_proj.weight, first.opt_proj.weight)
    with pytest.raises(
        checkpoints.CheckpointError, match="ln_vision is frozen: name this checkpoint as model.finetuned"
    ):
        build(pretrained=str(ours))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train/pretrain_stage1", "eval/ret_coco_eval", "eval/ret_flickr_eval"])
def test_stage_1_files_of_the_wheel(name, model_config, cache, tmp_path):
    """LAVIS's tasks `image_text_pretrain` and `retrieval`, which asks a model for its matrices."""
    path = PROJECTS / f"{name}.yaml"
    sizes = {key: value for key, value in model_config().items() if key in Stage1Settings.model_fields}
    sizes.update(bert_model="demo", from_bert=False, pretrained="null", finetuned="null", load_finetuned=False)
    small = [f"model.{key}={value}" for key, value in sizes.items() if key != "arch" and not key.endswith("geometry")]
    for key in ("vit_geometry", "qformer_geometry"):
        small += [f"model.{key}.{inner}={size}" for inner, size in sizes[key].items()]
    small += ["run.device=cpu", "run.num_workers=0", "run.batch_size_train=2", "run.batch_size_eval=2"]
    images = cache / "coco/images"
    for dataset, section in OmegaConf.load(path).datasets.items():
        small += [f"datasets.{dataset}.vis_processor.{mode}.image_size=28" for mode in section.vis_processor]
        if name.startswith("eval"):
            files = cache / "coco/annotations/coco_karpathy"
            small.append(f"datasets.{dataset}.build_info.images.storage={images}")
            small += [
                f"datasets.{dataset}.build_info.annotations.{split}.storage={files}_{split}.json"
                for split in ("train", "val", "test")
            ]
    run = train if name.startswith("train") else evaluate
    if run is train:
        small.append("run.max_epoch=1")
    logs = run(one_word_changed(path, tmp_path, "blip2"), small)
    assert run is train or 0 <= logs["test"]["txt_r1"] <= 100
    if run is train:
        (last,) = (tmp_path / "output/BLIP2/Pretrain_stage1").glob("*/checkpoint_last.pth")
        assert {"itm_head.weight", "kv_prefix.prefix_tokens"} <= set(checkpoints.read(last)["model"])


def test_zero_shot_vqa_of_lavis_main(small, cache, tmp_path):
    """The settings of LAVIS main's vqav2_zeroshot_opt_eval.yaml, on its data set and task."""
    names = [f"val2014/COCO_val2014_{i:012}.jpg" for i in range(1, 5)]
    questions = [{"image_id": i, "question": "what is it?", "question_id": 10 + i} for i in range(4)]
    answered = [
        {
            **{k: q[k] for k in ("image_id", "question_id")},
            "question_type": "what is",
            "answer_type": "other",
            "answers": [{"answer": "mat", "answer_id": k} for k in range(10)],
        }
        for q in questions
    ]
    head = {"info": {}, "task_type": "", "data_type": "", "data_subtype": "", "license": {}}
    rows = [{"image": n, "question": q["question"], "question_id": q["question_id"]} for n, q in zip(names, questions)]
    contents = {
        "vqa_val_eval.json": rows,
        "answer_list.json": [],
        "v2_OpenEnded_mscoco_val2014_questions.json": {**head, "questions": questions},
        "v2_mscoco_val2014_annotations.json": {**head, "annotations": answered},
    }
    for name, content in contents.items():
        (cache / "coco/annotations" / name).write_text(json.dumps(content))
    (tmp_path / "vqav2.yaml").write_text(
        """
model: {arch: blip2_opt_kvmod, model_type: pretrain_opt2.7b, use_grad_checkpoint: false}
datasets:
  coco_vqa:
    type: eval
    vis_processor: {eval: {name: blip_image_eval, image_size: 28}}
    text_processor: {eval: {name: blip_question}}
run:
  {task: vqa, batch_size_train: 16, batch_size_eval: 64, num_workers: 4, max_len: 10, min_len: 1, num_beams: 5,
   inference_method: generate, prompt: "Question: {} Short answer:", seed: 42, output_dir: output/BLIP2/VQA,
   evaluate: true, test_splits: [val], device: cuda, world_size: 1, dist_url: "env://", distributed: true}
"""
    )
    logs = evaluate(str(tmp_path / "vqav2.yaml"), small)
    assert 0 <= logs["val"]["agg_metrics"] <= 100
