"""`lavis-kvmod card`: of a real run, and what its author wrote into it."""

import hashlib
import json
import re

import pytest
import yaml
from PIL import Image
from whole_runs import write_run  # noqa: F401  (a fixture)

from lavis_kvmod.commands import cli
from lavis_kvmod.commands.train import train


def test_a_runs_card_tells_what_its_files_do_and_loads_as_it_says(write_run, tmp_path, capsys, monkeypatch):  # noqa: F811
    train(write_run(test_splits=["test"], max_epoch=1))
    (folder,) = (tmp_path / "output").iterdir()
    assert cli.main(["card", str(folder), "--name", "red [seven]", "--license", "bsd-3-clause"]) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")

    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "bsd-3-clause" and front["pipeline_tag"] == "visual-question-answering"
    assert front["tags"] == ["blip-2", "lavis", "kv-prefix"] and front["datasets"] == ["coco_vqa"]
    tests = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines() if line.startswith('{"test_')]
    results = {result["dataset"]["split"]: result["metrics"] for result in front["model-index"][0]["results"]}
    assert results["test"] == [{"type": "accuracy", "name": "overall", "value": round(tests[-1]["test_overall"], 4)}]

    assert "# red \\[seven\\]" in text and "of seed 42" in text and "no licence was given" not in text
    assert hashlib.sha256((folder / "checkpoint_best.pth").read_bytes()).hexdigest() in text
    assert text.count("| `kv_prefix` |") == 1 and str(folder) not in text.split("<details>")[0]

    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(folder)
    Image.new("RGB", (60, 40), "teal").save("picture.jpg")
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.endswith("\n")

    mine = text.replace("Not said by whoever trained it.", "For reading scans.")
    (folder / "README.md").write_text(mine, encoding="utf-8")
    assert cli.main(["card", str(folder), "--name", "red [seven]", "--license", "bsd-3-clause"]) == 0
    assert (folder / "README.md").read_text(encoding="utf-8") == mine


def test_what_has_no_card(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("{}\n")
    assert cli.main(["card", str(tmp_path)]) == 2
    assert "expected the folder of a training, with its checkpoint_best.pth or" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["card"])
