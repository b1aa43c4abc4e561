"""``kvmod_vqa``: finetune and evaluate visual question answering on any data set that has its answers."""

import logging
from typing import Any, Dict, List, Optional, Tuple

from lavis.tasks.vqa import VQATask

from lavis_kvmod.datasets.answer_list import read_answer_list
from lavis_kvmod.models.language.text import QUESTION
from lavis_kvmod.system.schema import ConfigurationError
from lavis_kvmod.tasks.datasets import BuildsDatasets
from lavis_kvmod.tasks.evaluation import DatasetEvaluation, Row, decoding_of, known_to, plain_id, unscored
from lavis_kvmod.tasks.ground_truth import Truth, official_truth, truth_of
from lavis_kvmod.tasks.predictions import confidence
from lavis_kvmod.tasks.settings import VQASettings
from lavis_kvmod.tasks.vqa_accuracy import Scored, accuracy, cannot_be_matched, is_soft, summarise

# BLIP-2's prompt for VQA (arXiv 2301.12597, appendix; LAVIS main's vqav2_zeroshot_opt_eval.yaml)
DEFAULT_PROMPT = "Question: {} Short answer:"


class KVModVQATask(DatasetEvaluation, VQATask, BuildsDatasets):
    """LAVIS's VQA task with one prompt for training and evaluation, and metrics from the data set's own answers.

    The prompt is ``run.prompt``, else ``model.prompt`` where it has a place for the question, else
    "Question: {} Short answer:".

    Args:
        candidates: what ``inference_method: rank`` chooses from; by default the evaluated data set's ``answer_list``.
        valid_loss: also compute the mean loss, where evaluation batches carry the answers.
        decoding: more arguments of the model's ``predict_answers``, for generated answers.
        **lavis: LAVIS's own arguments.
    """

    target = "answer"
    goodness = ("accuracy",)

    def __init__(
        self,
        *,
        candidates: Optional[List[str]] = None,
        valid_loss: bool = True,
        decoding: Optional[Dict[str, Any]] = None,
        **lavis: Any,
    ):
        super().__init__(**lavis)
        self.decoding = decoding or {}
        self.candidates = candidates
        self.valid_loss = valid_loss

    @classmethod
    def setup_task(cls, cfg: Any) -> "KVModVQATask":
        """Build from LAVIS's config; answers are generated unless ``inference_method`` says otherwise."""
        run, model = cfg.run_cfg, cfg.model_cfg
        model_prompt = model.get("prompt", None) or ""
        settings = VQASettings.of(run)
        return cls(
            num_beams=settings.num_beams,
            max_len=settings.max_len,
            min_len=settings.min_len,
            evaluate=run.get("evaluate", False),
            num_ans_candidates=settings.num_ans_candidates,
            inference_method=settings.inference_method,
            prompt=settings.prompt or (model_prompt if QUESTION in model_prompt else DEFAULT_PROMPT),
            candidates=read_answer_list(settings.answer_list) if settings.answer_list else None,
            valid_loss=settings.valid_loss,
            decoding=decoding_of(settings),
        )

    def build_datasets(self, cfg: Any) -> Dict[str, Dict[str, Any]]:
        """LAVIS's; ranking without candidates is found here, before the model is loaded.

        Raises:
            ConfigurationError: naming the splits that have nothing to rank.
        """
        datasets = super().build_datasets(cfg)
        run = cfg.run_cfg
        evaluated = [*(run.get("valid_splits") or []), *(run.get("test_splits") or [])]
        lacking = [
            f"run.inference_method: rank needs candidates, and {name}'s split {split!r} has no answer_list; set "
            "run.answer_list to a JSON or text file of answers, or run.inference_method: generate"
            for name, splits in datasets.items()
            for split, dataset in splits.items()
            if self.inference_method == "rank" and split in evaluated and not self._candidates_for(dataset)
        ]
        if lacking:
            raise ConfigurationError(getattr(cfg.args, "cfg_path", "the run file"), lacking)
        return datasets

    def _candidates_for(self, dataset: Any) -> Optional[List[str]]:
        return self.candidates or getattr(dataset, "answer_list", None)

    def before_evaluation(self, model: Any, dataset: Any, **kwargs: Any) -> None:
        """Remember the data set, and the candidates to rank for it."""
        super().before_evaluation(model, dataset, **kwargs)
        self.answer_list = self._candidates_for(dataset)

    def train_step(self, model: Any, samples: Dict[str, Any]) -> Any:
        """The loss on the answers, with the task's prompt."""
        return super().train_step(model, self.as_trained(model, samples))

    def as_trained(self, model: Any, samples: Dict[str, Any]) -> Dict[str, Any]:
        """``samples`` with the task's prompt where they bring none."""
        samples.setdefault("prompt", self.prompt)
        return samples

    def has_targets(self, samples: Dict[str, Any]) -> bool:
        """Whether a batch carries answers to each of its questions, as our data sets' do."""
        if not all(key in samples for key in ("answer", "weight", "n_answers")):
            return False
        return 0 not in samples["n_answers"] and all(answer.strip() for answer in samples["answer"])

    def valid_step(self, model: Any, samples: Dict[str, Any]) -> List[Row]:
        """Answers of a batch, with question ids of any type."""
        answers = model.predict_answers(
            samples=samples,
            answer_list=self.answer_list,
            inference_method=self.inference_method,
            num_beams=self.num_beams,
            max_len=self.max_len,
            min_len=self.min_len,
            num_ans_candidates=self.num_ans_candidates,
            prompt=self.prompt,
            **known_to(model.predict_answers, return_scores=True, **self.decoding),
        )
        ids = zip(samples["instance_id"], samples["question_id"], samples["text_input"])
        return [
            {
                "instance_id": instance,
                "question_id": plain_id(question_id),
                "question": question,
                "answer": getattr(answer, "answer", answer),
                **(confidence(answer) if hasattr(answer, "log_prob") else {}),
            }
            for (instance, question_id, question), answer in zip(ids, answers)
        ]

    def score(self, rows: List[Row], annotations: List[Row]) -> Tuple[List[Row], Dict[str, Any]]:
        """Accuracy in per cent, overall and by answer and question type; ``agg_metrics`` is the overall one."""
        official = official_truth(self._dataset)
        truths = [truth_of({"question_id": row["question_id"], **ann}, official) for row, ann in zip(rows, annotations)]
        complete = [_complete(*of_row) for of_row in zip(rows, annotations, truths)]
        scored = [
            Scored(row["accuracy"], is_soft(truth.answers), truth.question_type, truth.answer_type)
            for row, truth in zip(complete, truths)
            if truth.answers
        ]
        if not scored:
            return complete, unscored()
        if len(scored) < len(rows):
            logging.warning(
                "%d of %d questions have no answers and were not scored", len(rows) - len(scored), len(rows)
            )
        _warn_of_hopeless(truths)
        metrics = summarise(scored)
        return complete, {**metrics, "agg_metrics": metrics["overall"], "scored": len(scored)}


def _complete(row: Row, annotation: Row, truth: Truth) -> Row:
    """A row as it is written: LAVIS's keys, and what one wants to know beside the prediction."""
    known = {"question_type": truth.question_type, "answer_type": truth.answer_type}
    return {
        "instance_id": row["instance_id"],
        "question_id": row["question_id"],
        "image": plain_id(annotation.get("image", annotation.get("image_id"))),
        "question": annotation.get("question", row["question"]),
        **{key: value for key, value in known.items() if value},
        "answers": truth.answers,
        "prediction": row["answer"],
        **({"accuracy": accuracy(row["answer"], truth.answers)} if truth.answers else {}),
        **{key: value for key, value in row.items() if key not in ("instance_id", "question_id", "question")},
    }


def _warn_of_hopeless(truths: List[Truth]) -> None:
    hopeless = [truth.answers for truth in truths if truth.answers and cannot_be_matched(truth.answers)]
    if hopeless:
        logging.warning(
            "%d of %d questions cannot be answered right: VQA's official rule normalises predictions but not people's "
            "answers, such as %r; write these in lower case, with digits and without articles",
            len(hopeless),
            len(truths),
            hopeless[0][0],
        )
