"""`lavis-kvmod memory`, and the tables in the docs."""

from pathlib import Path

import pytest

from lavis_kvmod.commands import cli

SIZES = Path(__file__).resolve().parents[2] / "docs" / "sizes.md"


def rows(printed):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]


@pytest.mark.slow
def test_both_tables(capsys):
    demo = ["memory", "--cfg-path", "projects/kvmod/demo_vqa.yaml", "--options", "run.device=cuda"]
    assert cli.main([*demo, "--batch-sizes", "1024"]) == 0
    head, _, plain, recomputed, generation_head, _, generation = rows(capsys.readouterr().out)
    assert head[1:] == ["batch", "weights", "gradients", "AdamW", "activations", "workspace", "total"]
    assert plain[:2] == ["false", "1024"] and recomputed[:2] == ["true", "1024"]
    for row in (plain, recomputed):
        assert float(row[-1]) == pytest.approx(sum(map(float, row[2:-1])), abs=0.3)
    assert float(recomputed[5]) < float(plain[5])
    assert generation_head == ["batch", "weights", "K/V cache", "workspace", "total"] and generation[0] == "1024"


def test_a_model_it_does_not_know(tmp_path):
    path = tmp_path / "stock.yaml"
    path.write_text("model: {arch: blip2_opt, model_type: pretrain_opt2.7b}\ndatasets: {digits_vqa: {}}\nrun: {}\n")
    with pytest.raises(SystemExit, match="names blip2_opt; this command knows blip2_opt_kvmod"):
        cli.main(["memory", "--cfg-path", str(path)])


@pytest.mark.slow
@pytest.mark.parametrize("run_file", ["vqa", "vqa_opt6.7b"])
def test_the_docs_show_what_the_command_prints(run_file, capsys):
    cli.main(["memory", "--cfg-path", f"projects/kvmod/{run_file}.yaml", "--batch-sizes", "1", "4", "16", "32"])
    tables = [block for block in capsys.readouterr().out.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        assert table.strip() in SIZES.read_text(encoding="utf-8")
