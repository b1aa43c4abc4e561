"""What linear probes read from features, and how a gain is laid over it."""

import numpy as np
import torch

from lavis_kvmod.models.vision.feature_cache import FrozenFeatures
from lavis_kvmod.studies.probes import Asked, probe
from lavis_kvmod.studies.results import summarise
from lavis_kvmod.studies.study import Arm, Primary, Study, StudySettings

INKS = ("red", "green", "blue")


def seen(count, first, vit_knows):
    """Images of one of three inks, which the second encoder tells, and the first one at times."""
    rng = np.random.default_rng(first)
    features, asked = {}, []
    for number in range(first, first + count):
        ink = number % 3
        of_ink = torch.eye(3)[ink] + torch.tensor(rng.normal(0, 0.1, 3)).float()
        noise = torch.tensor(rng.normal(size=(5, 3))).float()
        features[str(number)] = FrozenFeatures(noise + of_ink * 5 * vit_knows, of_ink)
        asked.append(Asked(str(number), "ink", "What colour is the ink?", INKS[ink]))
        asked.append(Asked(str(number), "of digit", f"What colour is the {number}?", INKS[ink]))
    return features, asked


def test_a_probe_reads_what_is_there_and_nothing_else():
    for vit_knows in (False, True):
        features, train = seen(150, 0, vit_knows)
        more, test = seen(60, 150, vit_knows)
        found = probe(train, test, {**features, **more})
        assert list(found) == ["ink"] and found["ink"]["aux"] == 100
        assert (found["ink"]["vit"] > 95) if vit_knows else (found["ink"]["vit"] < 60)
    first_alone = {key: own._replace(pooled=None) for key, own in {**features, **more}.items()}
    assert set(probe(train, test, first_alone)["ink"]) == {"vit"}


def test_a_gain_is_laid_over_the_gap_of_the_probes():
    def result(arm, right, vit):
        questions = [
            {"id": str(i), "image": str(i // 2), "type": "ink", "needs": None, "answer": "red", "right": i < right}
            for i in range(20)
        ]
        return {
            "arm": arm, "seed": 1, "questions": questions, "trained_parameters": 1, "seconds": 1.0,
            "attention_share": None, "probes": {"ink": {"vit": vit, "aux": 100.0}},
        }  # fmt: skip

    pairs = {"with-0": "without-0", "with-9": "without-9"}
    arms = [Arm(name, "", []) for pair in pairs.items() for name in pair]
    settings = StudySettings(seeds=[1], gains=pairs, resamples=100)
    study = Study("dose", "run.yaml", settings, arms, Primary("question_type/ink", "with-0", "without-0"))
    results = [
        result("with-0", 20, 20),
        result("without-0", 4, 20),
        result("with-9", 20, 90),
        result("without-9", 18, 90),
    ]
    gains = summarise(study, results)["gains"]
    assert [(p["gap"], p["gain"]["mean"]) for p in gains["points"]] == [(80, 80), (10, 10)]
    assert abs(gains["line"]["slope"] - 1) < 1e-6 and abs(gains["line"]["at_zero"]) < 1e-6
