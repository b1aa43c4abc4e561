"""COCO's metrics: equal to pycocoevalcap's own evaluation, and honest about what is not there."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pycocoevalcap import eval as cocoeval
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.spice import get_stanford_models
from pycocoevalcap.spice import spice as spice_module
from pycocotools.coco import COCO

from lavis_kvmod.demo import digits
from lavis_kvmod.tasks import caption_metrics
from lavis_kvmod.tasks.caption_metrics import METRICS, aggregate, score_captions
from lavis_kvmod.tasks.caption_tokens import java_problem

needs_java = pytest.mark.skipif(java_problem() is not None, reason="no java")
WITHOUT_METEOR = ("Bleu", "ROUGE_L", "CIDEr", "SPICE")  # METEOR takes 8 seconds to start
HAND_WRITTEN = [
    (["A man's dog is running, fast!", "the dog runs"], "a dog that's running"),
    (["Two cups (and a saucer) on a table.", "cups", "it isn't empty"], "two cups on the table"),
    (["an astronaut in front of a flag"], "a woman in an orange suit"),
]


def real_captions(n=60):
    """Digits' captions with a wrong word here and there, each image with two references, and some by hand."""
    rng = random.Random(0)
    scans = digits.load_scans("test")[:n]
    pairs = []
    for scan in scans:
        truth = digits.caption(scan)
        words = truth.split()
        words[rng.randrange(len(words))] = rng.choice(["red", "seven", "paper"])
        pairs.append(([truth, f"{scan.ink} digit, on {scan.paper}"], " ".join(words)))
    return pairs + HAND_WRITTEN


def coco_evaluation(folder, pairs, monkeypatch, scorers_replaced):
    """COCOEvalCap on files in COCO's layout."""
    images = [{"id": i} for i in range(len(pairs))]
    references = [(i, text) for i, (texts, _) in enumerate(pairs) for text in texts]
    annotations = [{"image_id": i, "id": k, "caption": text} for k, (i, text) in enumerate(references)]
    (folder / "gt.json").write_text(json.dumps({"images": images, "annotations": annotations, "type": "captions"}))
    results = [{"image_id": i, "caption": caption} for i, (_, caption) in enumerate(pairs)]
    (folder / "results.json").write_text(json.dumps(results))
    for name in scorers_replaced:
        monkeypatch.setattr(cocoeval, name, NotThere)
    coco = COCO(str(folder / "gt.json"))
    evaluation = cocoeval.COCOEvalCap(coco, coco.loadRes(str(folder / "results.json")))
    evaluation.evaluate()
    return evaluation


class NotThere:
    def compute_score(self, gts, res):
        return 0.0, [0.0] * len(gts)

    def method(self):
        return "left out of this comparison"


def assert_equal(got, evaluation, names):
    assert got.tokeniser == "ptb"
    for name in names:
        assert got.metrics[name] == pytest.approx(evaluation.eval[name], abs=1e-12), name
        theirs = [evaluation.imgToEval[i][name] for i in sorted(evaluation.imgToEval)]
        assert got.by_image[name] == pytest.approx(theirs, abs=1e-12), name


@needs_java
def test_equal_to_pycocoevalcap(tmp_path, monkeypatch):
    pairs = real_captions()
    evaluation = coco_evaluation(tmp_path, pairs, monkeypatch, ["Meteor", "Spice"])
    got = score_captions([caption for _, caption in pairs], [texts for texts, _ in pairs], WITHOUT_METEOR)
    assert_equal(got, evaluation, ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"])
    assert aggregate(got.metrics) == pytest.approx(evaluation.eval["CIDEr"] + evaluation.eval["Bleu_4"])
    assert got.scored == len(pairs) and got.notes == []


@pytest.mark.slow
@needs_java
def test_meteor_equals_pycocoevalcaps(tmp_path, monkeypatch):
    pairs = real_captions()
    evaluation = coco_evaluation(tmp_path, pairs, monkeypatch, ["Spice"])
    got = score_captions([caption for _, caption in pairs], [texts for texts, _ in pairs], ["METEOR"])
    assert set(got.metrics) == {"METEOR"}
    assert_equal(got, evaluation, ["METEOR"])


@pytest.fixture()
def no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture()
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"tried to download {args[0]}")

    monkeypatch.setattr(get_stanford_models, "urlretrieve", refuse)


def test_without_java_what_needs_it_is_left_out_and_the_rest_is_marked(no_java, no_network):
    pairs = real_captions()
    got = score_captions([caption for _, caption in pairs], [texts for texts, _ in pairs])
    assert set(got.metrics) == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"}
    assert got.left_out == {name: "there is no java on the PATH" for name in ("METEOR", "SPICE")}
    assert got.tokeniser == "simple" and "simple tokeniser: there is no java" in got.notes[0]
    assert all(value > 0.1 for value in got.metrics.values())


@needs_java
def test_spice_is_not_downloaded(no_network):
    got = score_captions(["a cat"] * 2, [["a cat"], ["a dog"]], ["SPICE"])
    if "SPICE" not in got.metrics:  # somebody may have its models
        assert "python -m pycocoevalcap.spice.get_stanford_models downloads it" in got.left_out["SPICE"]


@pytest.fixture()
def spice_with_broken_models(tmp_path, monkeypatch):
    """pycocoevalcap's SPICE, with files of the right names where its models should be."""
    folder = tmp_path / "spice"
    shutil.copytree(
        Path(spice_module.__file__).parent, folder, ignore=shutil.ignore_patterns("tmp", "cache", "*models*jar")
    )
    for name in (f"{get_stanford_models.JAR}.jar", f"{get_stanford_models.JAR}-models.jar"):
        (folder / "lib" / name).write_bytes(b"")
    monkeypatch.setattr(spice_module, "__file__", str(folder / "spice.py"))
    monkeypatch.setattr(get_stanford_models, "SPICEDIR", str(folder))
    return folder


@needs_java
def test_a_spice_that_fails_is_left_out(spice_with_broken_models, no_network):
    got = score_captions(["a cat"] * 2, [["a cat"], ["a dog"]], ["SPICE", "ROUGE_L"])
    assert set(got.metrics) == {"ROUGE_L"}
    assert "its Java program failed (CalledProcessError" in got.left_out["SPICE"]


JAVA = """#!{python}
# The three programs that pycocoevalcap starts, by their contracts alone: PTB's tokeniser, METEOR and SPICE.
import json, sys

def share(said, texts):
    words = said.split()
    return sum(word in " ".join(texts).split() for word in words) / len(words)

arguments = sys.argv[1:]
if "-version" in arguments:
    print("stub", file=sys.stderr)
elif "edu.stanford.nlp.process.PTBTokenizer" in arguments:
    sys.stdout.write(sys.stdin.read().lower())
elif "meteor-1.5.jar" in arguments:
    for line in iter(sys.stdin.readline, ""):
        command, *parts = line.strip().split(" ||| ")
        if command == "SCORE":
            print(share(parts[-1], parts[:-1]), flush=True)
        else:
            values = [float(part) for part in parts]
            print(*values, sum(values) / len(values), sep="\\n", flush=True)
elif "spice-1.0.jar" in arguments:
    images = json.load(open(arguments[arguments.index("spice-1.0.jar") + 1]))
    results = [
        {{
            "image_id": image["image_id"],
            "test_tuples": [],
            "ref_tuples": [],
            "scores": {{
                "All": {{"f": share(image["test"], image["refs"]), "pr": 1.0, "re": 1.0, "numImages": 1.0}},
                "Cardinality": {{"f": None, "pr": 0.0, "re": None, "numImages": 1.0}},
            }},
        }}
        for image in reversed(images)
    ]
    json.dump(results, open(arguments[arguments.index("-out") + 1], "w"))
else:
    sys.exit(f"unknown: {{arguments}}")
"""


@pytest.fixture()
def stub_java(tmp_path, monkeypatch):
    """A ``java`` on the PATH which scores a caption by the share of its words that its references have."""
    path = tmp_path / "bin" / "java"
    path.parent.mkdir()
    path.write_text(JAVA.format(python=sys.executable), encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)


def test_what_java_programs_answer_is_in_the_metrics(stub_java, spice_with_broken_models, no_network):
    """pycocoevalcap's own METEOR and SPICE, with only Java replaced (real METEOR is in the slow tests)."""
    captions = ["a cat", "a red dog here", "cup"]
    references = [["A cat on a mat", "one cat"], ["the dog", "a dog"], ["tea"]]
    got = score_captions(captions, references)
    assert got.left_out == {} and got.tokeniser == "ptb" and got.scored == 3
    assert got.by_image["SPICE"] == got.by_image["METEOR"] == [1.0, 0.5, 0.0]
    assert got.metrics["SPICE"] == got.metrics["METEOR"] == pytest.approx(0.5)
    assert set(got.metrics) == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE"}
    unscored = score_captions(["a cat", "a red dog here"], [["?"], ["the dog", "a dog"]], ["SPICE"])
    assert math.isnan(unscored.by_image["SPICE"][0]) and unscored.metrics == {"SPICE": 0.5}


@needs_java
def test_a_meteor_that_dies_is_left_out_and_nothing_hangs(monkeypatch):
    """pycocoevalcap's Meteor keeps its lock when it fails, and waits for it when it is deleted."""
    started = []

    class Dying(Meteor):
        def __init__(self):
            super().__init__()
            started.append(self)
            self.meteor_p.kill()
            self.meteor_p.wait()

    monkeypatch.setattr(caption_metrics, "Meteor", Dying)
    got = score_captions(["a cat"] * 2, [["a cat"], ["a dog"]], ["METEOR", "ROUGE_L"])
    assert set(got.metrics) == {"ROUGE_L"} and "its Java program failed" in got.left_out["METEOR"]
    (meteor,) = started
    assert not meteor.lock.locked() and meteor.meteor_p.stdout.closed


@pytest.mark.slow
@needs_java
def test_meteor_leaves_no_process_behind(monkeypatch):
    started = []

    class Watched(Meteor):
        def __init__(self):
            super().__init__()
            started.append(self.meteor_p)

    monkeypatch.setattr(caption_metrics, "Meteor", Watched)
    got = score_captions(["a cat on a mat", ""], [["a cat ||| on a mat"], ["a dog"]], ["METEOR"])
    assert 0 < got.metrics["METEOR"] < 1
    assert started[0].poll() is not None and started[0].stdin.closed and started[0].stderr.closed


def test_few_images(no_java):
    one = score_captions(["a cat"], [["a cat"]])
    assert one.left_out["CIDEr"] == "of one image it is 0 whatever was said" and "CIDEr" not in one.metrics
    assert aggregate(one.metrics) == one.metrics["Bleu_4"]
    few = score_captions(["a cat", "dog"], [["a cat"], ["a dog"]])
    assert any("CIDEr of 2 images says little" in note for note in few.notes)


def test_images_without_a_word_to_compare_with(no_java):
    got = score_captions(["a cat", "", "..."], [["..."], ["a dog", "!"], ["a cup"]], WITHOUT_METEOR)
    assert got.scored == 2
    assert math.isnan(got.by_image["ROUGE_L"][0]) and got.by_image["ROUGE_L"][1:] == [0.0, 0.0]
    nothing = score_captions(["a cat"], [["?"]])
    assert (nothing.metrics, nothing.scored) == ({}, 0)


def test_only_what_is_wanted_is_computed(no_java, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    got = score_captions(["a cat"] * 2, [["a cat"], ["a dog"]], ["ROUGE_L"])
    assert set(got.metrics) == {"ROUGE_L"} and got.left_out == {}
    assert aggregate(got.metrics) is None
    assert METRICS == ("Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
