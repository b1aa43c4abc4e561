"""The keys of the run section that our tasks read, checked before anything heavy is loaded."""

from typing import List

from omegaconf import DictConfig, OmegaConf

from lavis_kvmod.datasets.answer_list import answer_list_problem
from lavis_kvmod.models.blip2_opt_kvmod import INFERENCE_METHODS
from lavis_kvmod.tasks.caption_metrics import METRICS

VQA, CAPTIONING = "kvmod_vqa", "kvmod_captioning"

# Beside LAVIS's keys.
RUN_KEYS = ("answer_list", "caption_metrics", "valid_loss")


def task_problems(run: DictConfig) -> List[str]:
    """What is wrong with the run section's keys for our tasks."""
    problems = []
    if not isinstance(run.get("valid_loss", True), bool):
        problems.append(f"run.valid_loss: expected true or false, got {run.valid_loss!r}")
    if run.task == VQA:
        method, candidates = run.get("inference_method", "generate"), run.get("num_ans_candidates", 128)
        if method not in INFERENCE_METHODS:
            problems.append(f"run.inference_method: expected {' or '.join(INFERENCE_METHODS)}, got {method!r}")
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
            problems.append(f"run.num_ans_candidates: expected a whole number above 0, got {candidates!r}")
        problem = answer_list_problem(run.get("answer_list", None))
        problems += [f"run.answer_list: {problem}"] if problem else []
    if run.task == CAPTIONING:
        wanted = run.get("caption_metrics", METRICS)
        names = list(wanted) if OmegaConf.is_list(wanted) or isinstance(wanted, tuple) else [wanted]
        unknown = [name for name in names if name not in METRICS]
        if unknown or not names:
            problems.append(f"run.caption_metrics: expected a list of {', '.join(METRICS)}, got {wanted}")
    return problems
