"""`lavis-kvmod attend`, and how a model is loaded to be asked."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from lavis_kvmod.commands import cli
from lavis_kvmod.commands.asking import load_model
from lavis_kvmod.reports.attention import heat_map, panels, share_table


def test_a_picture_of_an_answer(run_folder, tmp_path, capsys):
    out = tmp_path / "seen.png"
    command = [
        "attend",
        "--image",
        str(run_folder / "cat.jpg"),
        "--checkpoint",
        str(run_folder / "checkpoint_best.pth"),
    ]
    command += ["--question", "Which digit is written?", "--answer", "seven", "--queries", "0", "4", "--out", str(out)]
    assert cli.main(command) == 0
    assert "answer: seven" in capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.width > 800 and len(sheet.getcolors(2**24)) > 1000
    assert cli.main([*command[:5], "--out", str(out)]) == 0  # a caption
    assert "caption:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, told",
    [
        (["--image", "/nowhere/cat.jpg"], "/nowhere/cat.jpg: no such file"),
        (["--out", "seen.jpg"], "--out: expected a name that ends in .png, got 'seen.jpg'"),
        (["--queries", "5"], "--queries: expected numbers from 0 to 4, got 5"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no CUDA GPU here"),
        (["--device", "toaster"], "--device: expected cpu, cuda or cuda:0, got 'toaster'"),
        (["--model-type", "pretrain"], "model_type: expected one of pretrain_opt2.7b"),
        (["--checkpoint", "/nowhere/best.pth"], "/nowhere/best.pth"),
    ],
)
def test_errors_are_sentences(run_folder, tmp_path, capsys, change, told):
    command = [
        "attend",
        "--image",
        str(run_folder / "cat.jpg"),
        "--question",
        "what?",
        "--out",
        str(tmp_path / "o.png"),
    ]
    command += ["--checkpoint", str(run_folder / "checkpoint_best.pth"), *change]
    assert cli.main(command) == 2
    printed = capsys.readouterr()
    assert told in printed.err and "Traceback" not in printed.err and printed.out == ""
    assert not (tmp_path / "o.png").exists()


def test_a_checkpoint_of_a_run_is_built_as_the_run_was(run_folder):
    asked = load_model(checkpoint=str(run_folder / "checkpoint_best.pth"))
    assert asked.prompt == "Q: {} A:" and not asked.model.training
    assert asked.model.kv_prefix.prefix_tokens.shape[0] == 3
    image = Image.fromarray(data.chelsea())
    samples = asked.samples(image, "What is it?")
    assert samples["text_input"] == ["what is it?"]  # through the text processor
    without = asked.without_prefix(samples)["soft_prompt"]
    asked.model.kv_prefix = None
    assert torch.equal(asked.model.encode(samples).soft_prompt, without)
    assert asked.answer(samples, num_beams=1).num_tokens > 0


def test_heat_is_where_the_weights_are():
    grey = Image.new("RGB", (50, 30), (128, 128, 128))
    heat = np.asarray(heat_map(grey, torch.tensor([[0.0, 0.0], [0.0, 0.5]]))).astype(int)
    assert heat[-1, -1, 0] - heat[0, 0, 0] > 100  # yellow against blue
    table = share_table(torch.tensor([[0.0, 1.0]]))
    assert table.getpixel((43, 60)) == (255, 255, 255) and table.getpixel((126, 60)) == (0, 0, 255)
    sheet = panels("a title " * 40, [(grey, "what it is")] * 5, columns=2)
    assert sheet.height > 3 * 30
