"""The keys of the run section that our tasks read."""

from typing import Dict, List, Literal, Optional, Type

from lavis_kvmod.datasets.answer_list import answer_list_problem
from lavis_kvmod.models.language.text import check_prompt
from lavis_kvmod.system.schema import Settings, key

VQA, CAPTIONING = "kvmod_vqa", "kvmod_captioning"


class GenerationSettings(Settings):
    """How text is generated: LAVIS's keys, with the meanings of its ``generate``."""

    num_beams: int = key(5, "beams; 1 is greedy", gt=0)
    max_len: int = key(30, "most new tokens", gt=0)
    min_len: int = key(1, "fewest new tokens", ge=0)
    length_penalty: float = key(
        1.0, "beams are compared by log-likelihood / length ** this: above 0 favours long texts"
    )
    repetition_penalty: float = key(1.0, "divides the scores of tokens that are there already; 1: none", gt=0)
    use_nucleus_sampling: bool = key(False, "draw from the likeliest tokens instead of searching")
    top_p: float = key(0.9, "the probability that those have together (nucleus sampling)", gt=0, le=1)
    temperature: float = key(1.0, "flattens (above 1) or sharpens what is drawn from (nucleus sampling)", gt=0)
    valid_loss: bool = key(True, "also compute the loss of an evaluation's targets ([metrics.md](metrics.md))")


class VQASettings(GenerationSettings):
    """What ``kvmod_vqa`` reads."""

    num_beams: int = key(3, "beams; 1 is greedy", gt=0)
    max_len: int = key(10, "most new tokens of an answer", gt=0)
    length_penalty: float = key(0.0, "as for captions; 0: the likelier answer is the better one, however short")
    prompt: Optional[str] = key(
        None, "frame of a question, with `{}` in its place; else `model.prompt`, else `Question: {} Short answer:`"
    )
    inference_method: Literal["generate", "rank"] = key(
        "generate",
        "`rank` takes the likeliest of a list ([metrics.md](metrics.md))",
        expected="generate or rank",
    )
    num_ans_candidates: int = key(128, "of how many, chosen by their first token, the likeliest is taken", gt=0)
    answer_list: Optional[str] = key(None, "file of the candidates for `rank` ([metrics.md](metrics.md))")

    def conflicts(self) -> List[str]:
        """What is wrong with the prompt and the list of answers."""
        problem = answer_list_problem(self.answer_list)
        found = [*super().conflicts(), *([f"answer_list: {problem}"] if problem else [])]
        return [*found, *(check_prompt("prompt", self.prompt) if self.prompt else [])]


class CaptioningSettings(GenerationSettings):
    """What ``kvmod_captioning`` reads."""

    num_captions: int = key(1, "captions drawn for an image; the likeliest is scored", gt=0)
    report_metric: bool = key(True, "score the captions")
    caption_metrics: List[Literal["Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE"]] = key(
        ["Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE"], "which ([metrics.md](metrics.md))", min_length=1
    )


class PretrainingSettings(Settings):
    """What ``kvmod_pretrain`` reads: nothing but the model's objectives."""


class RetrievalSettings(Settings):
    """What ``kvmod_retrieval`` reads."""

    k_test: int = key(128, "of the best, how many are ranked anew by the matching head; 0: none", ge=0)


# What our tasks read, by the name that `run.task` has.
TASK_SETTINGS: Dict[str, Type[Settings]] = {
    VQA: VQASettings,
    CAPTIONING: CaptioningSettings,
    "kvmod_pretrain": PretrainingSettings,
    "kvmod_retrieval": RetrievalSettings,
}
