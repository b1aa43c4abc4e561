"""Whether a run fits, decided for GPUs that are not here."""

from multiprocessing import get_context

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_kvmod.config.loading import KVModConfig
from lavis_kvmod.doctor.findings import NOTE, OK, WARN, WRONG
from lavis_kvmod.doctor.machine import GIB, GPU, Machine
from lavis_kvmod.doctor.run_file import (
    advice,
    data_findings,
    fit_finding,
    memory_findings,
    output_findings,
    run_file_findings,
    storage_findings,
    weight_findings,
)
from lavis_kvmod.memory import MemoryEstimate
from lavis_kvmod.memory.runs import Change
from lavis_kvmod.models.settings import ModelSettings
from lavis_kvmod.system.paths import resolve_config
from lavis_kvmod.weights.finding import WeightFile


def findings_of(path, options, here):
    """`run_file_findings` in a process of its own: its estimate starts autograd's threads, and where those run, no
    later test could fork a training."""
    with get_context("fork").Pool(1) as pool:
        return pool.apply(run_file_findings, (path, options, here))


def machine(total, free=None):
    return Machine(gpus=[GPU("A GPU", int(total * GIB), int((free or total) * GIB), (8, 0))], memory_total=16 * GIB)


def fit(computed, here, device="cuda"):
    return fit_finding("training takes 10 GiB", int(computed * GIB), here, device, lambda room: f"room {room // GIB}")


def test_a_run_fits_or_not():
    assert fit(10, machine(24)).mark == OK
    too_much = fit(30, machine(24))
    assert too_much.mark == WRONG and too_much.step == "room 24" and "A GPU has 24.0 GiB" in too_much.text
    close = fit(23, machine(24))  # without the allowance it would
    assert close.mark == WARN and close.step == "room 24"
    taken = fit(10, machine(24, free=8))
    assert taken.mark == WARN and "other processes" in taken.text and "nvidia-smi" in taken.step
    without = fit(10, Machine())
    assert without.mark == NOTE and "a GPU should have 11.5 GiB for it" in without.text
    assert fit(10, Machine(memory_total=16 * GIB), "cpu").mark == OK
    assert fit(20, Machine(memory_total=16 * GIB), "cpu").mark == WRONG
    assert fit(20, Machine(), "cpu").mark == OK  # a system that does not tell


def test_advice_is_options():
    changes = [
        Change({"model.opt_grad_checkpoint": True}, 10 * GIB),
        Change({"run.batch_size_train": 4, "run.accum_grad_iters": 8}, 12 * GIB),
    ]
    assert advice(changes, sharded=False) == (
        "model.opt_grad_checkpoint=true (10.0 GiB); or run.batch_size_train=4 run.accum_grad_iters=8 (12.0 GiB)"
    )
    assert "run.fsdp=true on several GPUs" in advice([], sharded=False)
    assert "run.fsdp" not in advice([], sharded=True)


def test_what_does_not_fit_is_computed_anew_with_what_is_advised(monkeypatch):
    """The demo on a GPU with room for a part of its batch."""
    cfg = KVModConfig(resolve_config("projects/kvmod/demo_vqa.yaml"), ["run.device=cuda"])
    asked = []

    def estimate(model, *, batch_size, train=True, **step):
        recomputed = model.get("opt_grad_checkpoint", False)
        asked.append((train, batch_size, recomputed, step["device"]))
        return MemoryEstimate({"opt_model": 4 * GIB}, workspace=batch_size * GIB // (2 if recomputed else 1))

    monkeypatch.setattr("lavis_kvmod.doctor.run_file.estimate", estimate)
    settings = ModelSettings.from_config(cfg.model_cfg)
    big = MemoryEstimate({}, workspace=500 * GIB)
    training, evaluation = memory_findings(cfg, settings, machine(150), big, big)
    assert training.mark == evaluation.mark == WRONG
    assert training.step == (
        "model.opt_grad_checkpoint=true (132 GiB); or run.batch_size_train=128 run.accum_grad_iters=2 (132 GiB)"
    )
    assert evaluation.step == "run.batch_size_eval=72"
    assert asked[0] == (True, 256, True, "cuda") and asked[-1] == (False, 72, False, "cuda")


def test_weights_in_another_half_than_the_run_computes_in():
    def findings(amp, vit, opt, device="cuda"):
        settings = ModelSettings(load_finetuned=False, vit_precision=vit, opt_precision=opt)
        return storage_findings(settings, amp, device)

    (both,) = findings("bf16", "fp16", "fp16")
    assert both.mark == WARN and both.step == "model.vit_precision=bf16 model.opt_precision=bf16"
    (opt,) = findings(True, "fp16", "bf16")
    assert opt.step == "model.opt_precision=fp16"
    assert findings("bf16", "bf16", "bf16") == findings("bf16", "fp32", "fp32") == []
    assert findings(False, "fp16", "fp16") == findings("bf16", "fp16", "fp16", "cpu") == []


def test_weights_and_what_is_still_to_come(tmp_path, monkeypatch):
    here = tmp_path / "b3.pth"
    here.write_bytes(b"")
    monkeypatch.setattr("lavis_kvmod.weights.downloads.reachable", lambda url: True)
    remote = WeightFile("image encoder", "https://example.org/none-such.pth", "model.vit_checkpoint")
    files = [WeightFile("auxiliary encoder", str(here), "model.aux_checkpoint"), remote]
    local, to_come = weight_findings(files, {"visual_encoder": 2 * GIB})
    assert (local.mark, local.text) == (OK, f"auxiliary encoder: {here}")
    assert to_come.mark == NOTE and to_come.text.endswith("none-such.pth, about 2.0 GiB")
    *_, full = weight_findings(files, {"visual_encoder": 2**60})
    assert full.mark == WRONG and "HF_HOME and TORCH_HOME" in full.step


def test_where_data_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("pictures", "lists", "shards"):
        (tmp_path / folder).mkdir()
    sections = {
        "custom_vqa": {
            "build_info": {
                "images": {"storage": ["pictures"]},
                "annotations": {
                    "train": {"storage": "lists/a.csv", "url": "https://example.org/a"},
                    "val": "lists/b.csv",
                },
            }
        },
        "wds_vqa": {"build_info": {"annotations": {"train": {"storage": "shards/{000..009}.tar"}, "val": None}}},
        "digits_vqa": {"build_info": {}},
    }
    (tmp_path / "lists/a.csv").touch()
    (tmp_path / "lists/b.csv").touch()
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path))
    assert [finding.text for finding in data_findings(OmegaConf.create(sections))] == [
        f"data: custom_vqa: {tmp_path / 'pictures'}, {tmp_path / 'lists'}",
        f"data: wds_vqa: {tmp_path / 'shards'}",
        "data: digits_vqa: comes with the package",
    ]


def test_room_for_checkpoints(tmp_path):
    (enough,) = output_findings(tmp_path / "new", 2**20, keep_last=4)
    assert enough.mark == OK and "checkpoints take up to 18 MiB" in enough.text  # 4, the best and the next
    (full,) = output_findings(tmp_path / "new", 2**60, keep_last=1)
    assert full.mark == WRONG and "run.output_dir" in full.step


def test_a_model_of_lavis_is_not_looked_into(tmp_path):
    path = tmp_path / "stock.yaml"
    path.write_text(
        "model: {arch: blip2_opt, model_type: pretrain_opt2.7b}\ndatasets: {digits_vqa: {}}\nrun: {device: cpu}\n"
    )
    found = run_file_findings(str(path), [], Machine())
    assert found[-1].mark == NOTE and "blip2_opt is LAVIS's own" in found[-1].text


@pytest.mark.slow
def test_the_published_model_on_a_24_gib_gpu(monkeypatch):
    """Everything but the GPU's memory is made to be there."""
    monkeypatch.setattr("lavis_kvmod.config.checking.cuda_capability", lambda: (8, 0))
    monkeypatch.setattr("lavis_kvmod.config.loading.data_problems", lambda cfg: [])
    monkeypatch.setattr("lavis_kvmod.weights.downloads.reachable", lambda url: True)
    options = ["run.batch_size_train=128", "run.batch_size_eval=128"]
    found = findings_of("projects/kvmod/vqa.yaml", options, machine(24))
    training, evaluation = found[-2:]
    assert training.mark == evaluation.mark == WRONG
    assert "model.opt_grad_checkpoint=true (" in training.step
    assert "run.batch_size_train=64 run.accum_grad_iters=" in training.step
    assert evaluation.step == "run.batch_size_eval=64"


@pytest.mark.slow
def test_the_doctor_is_no_torchrun():
    found = findings_of("projects/kvmod/demo_vqa.yaml", ["run.fsdp=true"], Machine(memory_total=64 * GIB))
    assert not [finding.text for finding in found if finding.mark not in (OK, NOTE)]
