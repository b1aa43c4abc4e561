"""One arm trained with one seed: what it answers, how sure it is of the right answers, and whether it uses its prefix.

An attention share says where a model looks, not what it takes from there. So each trained model is asked again with
another image's prefix: the share of its accuracy that this costs is its conditional utilisation rate (arXiv
2507.03262), and the right answers' log-probabilities tell what accuracies are too coarse for.
"""

import json
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional

import torch
from lavis.datasets.data_utils import prepare_sample

from lavis_kvmod.models.language.log_probs import answer_log_probs
from lavis_kvmod.studies.costs import costs
from lavis_kvmod.studies.features import share_features
from lavis_kvmod.studies.study import Member
from lavis_kvmod.tasks.evaluation import plain_id
from lavis_kvmod.weights.files import whole_or_nothing

__all__ = ["RESULT", "read_result", "train_member"]

RESULT = "answers.json"


def read_result(member: Member) -> Optional[Dict[str, Any]]:
    """What a finished training has left; None if it is not finished."""
    path = member.folder / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def train_member(
    member: Member,
    load_config: Callable[..., Any],
    build_runner: Callable[[Any], Any],
    features: Path,
    keep_checkpoints: bool = False,
) -> Dict[str, Any]:
    """Train (or go on with) one arm and one seed, and measure it.

    Returns:
        What is written to ``answers.json``: ``metrics``, ``trained_parameters``, ``costs``, ``seconds``,
        ``attention_share``; for each question its ``image``, ``type``, ``needs``, whether it was answered ``right``,
        the right answer's ``log_prob``; both also ``swapped``, with another image's prefix.
    """
    start = time.monotonic()
    options = [*member.options, f"run.output_dir={member.folder / 'run'}", "run.resume_ckpt_path=auto"]
    runner = build_runner(load_config(member.cfg_path, options))
    share_features(runner, features / f"{member.features}.pt")
    metrics = runner.train()[member.split]
    model = runner.unwrap_dist_model(runner.model)
    model.eval()
    questions = _questions(runner, member.split, "best")
    log_probs = _log_probs(runner, member.split)
    result: Dict[str, Any] = {
        "arm": member.arm,
        "seed": member.seed,
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, (int, float))},
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "attention_share": _attention_share(runner, member.split),
        "questions": [{**row, "log_prob": log_probs.get(row["id"])} for row in questions],
    }
    if getattr(model, "aux_encoder", None) is not None:
        _add_swapped(runner, member.split, result["questions"])
    result["costs"] = costs(runner, member.split)
    result["seconds"] = round(time.monotonic() - start, 1)
    with whole_or_nothing(member.folder / RESULT) as temporary:
        temporary.write_text(json.dumps(result), encoding="utf-8")
    if not keep_checkpoints:
        for file in member.folder.rglob("*.pth"):
            file.unlink()
    return result


def _add_swapped(runner: Any, split: str, questions: List[Dict[str, Any]]) -> None:
    model = runner.unwrap_dist_model(runner.model)
    model.swap_prefix = True
    try:
        runner.eval_epoch(split, "swapped", skip_reload=True)
        right = {row["id"]: row["right"] for row in _questions(runner, split, "swapped")}
        log_probs = _log_probs(runner, split)
    finally:
        model.swap_prefix = False
    for row in questions:
        row.update(right_swapped=right[row["id"]], log_prob_swapped=log_probs.get(row["id"]))


def _questions(runner: Any, split: str, epoch: str) -> List[Dict[str, Any]]:
    rows = json.loads((runner.result_dir / f"{split}_epoch{epoch}.json").read_text(encoding="utf-8"))
    return [
        {
            "id": str(row["question_id"]),
            "image": str(row["image"]),
            "type": row.get("question_type"),
            "needs": row.get("answer_type"),
            "answer": row["answers"][0],
            "right": row["accuracy"],
        }
        for row in rows
        if row.get("answers")
    ]


@torch.no_grad()
def _log_probs(runner: Any, split: str) -> Dict[str, float]:
    """The right answer's log-probability by question, where a question has one answer."""
    model, found = runner.unwrap_dist_model(runner.model), {}
    if not hasattr(model, "opt_model"):
        return {}
    for batch in runner.dataloaders[split]:
        samples = runner.task.as_trained(model, prepare_sample(batch, cuda_enabled=runner.cuda_enabled))
        if not runner.task.has_targets(samples) or any(int(count) != 1 for count in samples["n_answers"]):
            continue
        with runner.autocast():
            values = answer_log_probs(model, samples).tolist()
        found.update({str(plain_id(key)): round(value, 4) for key, value in zip(samples["question_id"], values)})
    return found


def _attention_share(runner: Any, split: str) -> Optional[float]:
    """The prefix's share of the Q-Former's attention, on the split's first batch."""
    model = runner.unwrap_dist_model(runner.model)
    if getattr(model, "kv_prefix", None) is None:
        return None
    batch: Mapping[str, Any] = next(iter(runner.dataloaders[split]))
    share = model.prefix_attention_share(prepare_sample(dict(batch), cuda_enabled=runner.cuda_enabled))
    return None if share is None else round(share, 4)
