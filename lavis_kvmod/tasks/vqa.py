"""``kvmod_vqa``: finetune and evaluate visual question answering on any data set that has its answers."""

import logging
from typing import Any, Dict, List, Optional

from lavis.common.dist_utils import is_main_process
from lavis.tasks.vqa import VQATask

from lavis_kvmod.models.text import QUESTION
from lavis_kvmod.tasks.datasets import BuildsDatasets
from lavis_kvmod.tasks.evaluation import DatasetEvaluation, as_list, plain_id
from lavis_kvmod.tasks.vqa_accuracy import accuracy, accuracy_by_type

# BLIP-2's prompt for VQA (arXiv 2301.12597, appendix; LAVIS main's vqav2_zeroshot_opt_eval.yaml)
DEFAULT_PROMPT = "Question: {} Short answer:"


class KVModVQATask(DatasetEvaluation, VQATask, BuildsDatasets):
    """LAVIS's VQA task with one prompt for training and evaluation, and metrics from the data set's own answers.

    The prompt is ``run.prompt``, else ``model.prompt`` where it has a place for the question, else
    "Question: {} Short answer:".
    """

    @classmethod
    def setup_task(cls, cfg) -> "KVModVQATask":
        """Build from LAVIS's config; answers are generated unless ``inference_method`` says otherwise."""
        run, model = cfg.run_cfg, cfg.model_cfg
        model_prompt = model.get("prompt", None) or ""
        return cls(
            num_beams=run.get("num_beams", 3),
            max_len=run.get("max_len", 10),
            min_len=run.get("min_len", 1),
            evaluate=run.get("evaluate", False),
            num_ans_candidates=run.get("num_ans_candidates", 128),
            inference_method=run.get("inference_method", "generate"),
            prompt=run.get("prompt", None) or (model_prompt if QUESTION in model_prompt else DEFAULT_PROMPT),
        )

    def train_step(self, model, samples):
        """The loss on the answers, with the task's prompt."""
        samples.setdefault("prompt", self.prompt)
        return super().train_step(model, samples)

    def valid_step(self, model, samples) -> List[Dict[str, Any]]:
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
        )
        ids = zip(samples["instance_id"], samples["question_id"], samples["text_input"])
        return [
            {
                "instance_id": instance,
                "question_id": plain_id(question_id),
                "question": question,
                "answer": answer,
            }
            for (instance, question_id, question), answer in zip(ids, answers)
        ]

    def after_evaluation(self, val_result, split_name, epoch=None, **kwargs) -> Optional[dict]:
        """Accuracy in per cent, overall and by question type; ``agg_metrics`` is the overall one (rank 0)."""
        rows = self.gather_predictions(val_result, split_name, epoch)
        if not is_main_process():
            return None
        annotations = self.annotations()
        scored = []
        for row in rows:
            annotation = annotations[row["instance_id"]]
            answers = annotation.get("answer", annotation.get("answers"))
            if answers is None:
                logging.warning("%s has no answers: predictions are written, not scored", split_name)
                return {}
            kind = annotation.get("question_type", "")
            scored.append((accuracy(row["answer"], as_list(answers)), kind))
        metrics = accuracy_by_type(scored)
        return {**metrics, "agg_metrics": metrics["overall"]}
