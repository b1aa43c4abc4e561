"""BLIP-2 OPT with two vision encoders: ``blip2_opt_kvmod``.

    image ─► EVA-CLIP-G ─► ln_vision ─► visual tokens ─┐
      └────► EfficientNet ─► pooled ─► KV prefix ──────┴─► Q-Former ─► opt_proj ─► soft prompt ─► OPT

In the Q-Former's place may stand another connector (docs/connectors.md); where one attends to nothing, `AuxTokens` puts
the second encoder's features in front of the soft prompt. Instead of a soft prompt, `GatedLayers` may stand between
OPT's own.

`encode` is that figure; ``forward``, ``generate``, ``predict_answers`` and ``extract_features`` all stand on it. They
take and give what LAVIS's ``blip2_opt`` does (``lavis/models/blip2_models/blip2_opt.py``, and LAVIS main for
``predict_answers``). Without KV modulation the Q-Former's model equals stock BLIP-2.
"""

from typing import Any, Dict, List, Optional, Union

import torch
from lavis.models.blip_models.blip_outputs import BlipOutputFeatures
from torch import Tensor, nn

from lavis_kvmod.models import attention_maps, build
from lavis_kvmod.models.base import model_type_files
from lavis_kvmod.models.connectors.aux_tokens import AuxTokens, joined
from lavis_kvmod.models.connectors.kv_prefix import PrefixGenerator
from lavis_kvmod.models.language.answers import answers_of
from lavis_kvmod.models.language.decoding import Search
from lavis_kvmod.models.language.gated_cross_attention import GatedLayers
from lavis_kvmod.models.language.opt import FrozenOPT
from lavis_kvmod.models.language.soft_prompt import ScoredAnswer, rank_answers
from lavis_kvmod.models.language.text import Prompt, answer_batch
from lavis_kvmod.models.settings import ANSWER_LOSSES, ModelSettings
from lavis_kvmod.models.several_images import by_number
from lavis_kvmod.models.soft_prompts import Encoded, SoftPromptModel, together
from lavis_kvmod.models.vision.auxiliary import Auxiliary

INFERENCE_METHODS = ("generate", "rank")


class Blip2OPTKVMod(SoftPromptModel):
    """BLIP-2 (arXiv 2301.12597) whose Q-Former also attends to a Key/Value prefix written by a second encoder.

    Trained: ``kv_prefix`` (and ``kv_gate``), ``Qformer`` with ``query_tokens``, ``opt_proj``. Frozen: the ViT with
    ``ln_vision``, the auxiliary encoder, OPT. Use `from_config` or LAVIS's ``load_model`` to build one.

    Args:
        opt_model, opt_tokenizer: the frozen language model (the tokenizer may be None in a model only to be counted).
        qformer_tokenizer: of a Q-Former with a text side, which then reads the question beside its queries.
        kv_prefix, aux_encoder: prefix generator and the encoder it reads; both None for stock BLIP-2.
        aux_tokens: in the generator's place, the encoder's features as tokens.
        gated_layers: cross-attention to the connector's output, in the place of ``opt_proj`` and the soft prompt.
        prefix_gate: ``none`` concatenates the prefix, ``tanh`` adds it behind a gate that starts at 0.
        prompt: put in front of captions; with ``{}``, the frame of a question.
        max_txt_len: most tokens of a caption, or of a prompt with its question.
        answer_loss: ``sample`` draws one answer a question by weight, ``all`` takes all, weighted.
        image_side: the arguments of `KVModBase`.

    Raises:
        ValueError: for an unknown ``prefix_gate`` or ``answer_loss``, or a prefix without its encoder.
    """

    PRETRAINED_MODEL_CONFIG_DICT = model_type_files(
        "blip2_opt_kvmod",
        *("pretrain_opt2.7b", "pretrain_opt6.7b", "caption_coco_opt2.7b", "caption_coco_opt6.7b", "demo"),
    )
    default_model_type = "pretrain_opt2.7b"
    settings_class = ModelSettings
    behind_qformer = {"opt_proj": True, "aux_tokens": True, "gated_layers": True, "opt_model": False}

    def __init__(
        self,
        *,
        opt_model: FrozenOPT,
        opt_tokenizer: Any,
        qformer_tokenizer: Any = None,
        kv_prefix: Optional[PrefixGenerator] = None,
        aux_encoder: Optional[Auxiliary] = None,
        aux_tokens: Optional[AuxTokens] = None,
        gated_layers: Optional[GatedLayers] = None,
        prefix_gate: str = "none",
        prompt: str = "",
        max_txt_len: int = 32,
        answer_loss: str = "sample",
        split_texts: bool = False,
        **image_side: Any,
    ):
        if answer_loss not in ANSWER_LOSSES:
            raise ValueError(f"answer_loss: expected one of {ANSWER_LOSSES}, got {answer_loss!r}")
        super().__init__(**image_side)
        self.opt_model = opt_model
        self.gated_layers = gated_layers
        self.opt_proj = None
        if gated_layers is None:
            self.opt_proj = nn.Linear(self.Qformer.hidden_size, opt_model.config.word_embed_proj_dim)
        self.aux_tokens = aux_tokens
        self._add_prefix(kv_prefix, aux_encoder, prefix_gate, aux_tokens, getattr(gated_layers, "kv_prefix", None))
        self.opt_tokenizer, self.qformer_tokenizer = opt_tokenizer, qformer_tokenizer
        if opt_tokenizer is not None:  # None only in a model that is there to be counted
            self.eos_token_id = opt_tokenizer("\n", add_special_tokens=False).input_ids[0]
        self.prompt, self.max_txt_len = prompt, max_txt_len
        self.answer_loss, self.split_texts = answer_loss, split_texts
        self._freeze()

    @classmethod
    def from_settings(cls, settings: ModelSettings, load: bool = True) -> "Blip2OPTKVMod":
        """The parts that the settings describe, put together; frozen towers with their weights if ``load``."""
        return cls(**build.opt_arguments(settings, load=load))

    # ------------------------------------------------------------ encode

    def encode(self, samples: Dict[str, Any], output_attentions: bool = False, with_prefix: bool = True) -> Encoded:
        """The figure above: ``samples["image"]`` (b, 3, H, H) -> soft prompt (b, q, opt width).

        Or several images a sample (b, k, 3, H, H), as `by_number` takes them. ``with_prefix`` False takes the prefix
        (or its tokens) away from a model that was trained with it.

        Raises:
            ValueError: if the images have another shape than the ViT was built for.
        """
        groups = by_number(samples)
        if len(groups) > 1:
            encoded = [self.encode(own, with_prefix=with_prefix) for _, own in groups]
            return together([rows for rows, _ in groups], encoded)
        features, text = self._with_text(self.seen(groups[0][1]), samples)
        aux, pooled = self.aux_tokens, features.pooled if with_prefix else None
        dropped = self.dropped(pooled)
        query_output = self.Qformer(
            query_embeds=joined("queries", self.queries(len(features.visual_tokens)), aux, pooled),
            encoder_hidden_states=joined("visual_tokens", features.visual_tokens, aux, pooled),
            prefix=self.prefixes(pooled, dropped, features.places),
            output_attentions=output_attentions,
            **text,
        )
        return Encoded(query_output, self._for_language_model(query_output.last_hidden_state, pooled, dropped))

    # ------------------------------------------------------------ loss

    def forward(self, samples: Dict[str, Any]) -> Dict[str, Tensor]:
        """The loss of a batch.

        Args:
            samples: ``image`` (b, 3, H, H) and ``text_input``; or fewer images, with ``image_index`` (b,), which says
                what image each text belongs to. For captioning, ``text_input`` is the b captions. For
                VQA it is the b questions, with ``answer`` (all answers of all questions in one list), ``n_answers``
                (b,) and ``weight`` (one for each answer), as LAVIS's collater gives them. ``prompt`` may replace
                the model's own, for all or one for each sample. For conversations (docs/conversations.md) images stand
                where their questions have ``<image>``: ``turns``, for each sample pairs of question and answer, which
                are all learnt; or questions as above with ``history``, the pairs before each.

        Returns:
            ``loss``: mean cross-entropy over the tokens to be predicted, which are the captions after the prompt, or
            the answers alone with their closing newline. ``loss_weight``: how many those are, or their weights' sum,
            so that means of several batches can be put together. In eval mode all answers of a question count, as
            with ``answer_loss: all``.

        Raises:
            ValueError: for wrong shapes, an empty question, answer or caption, or a question without answers.
        """
        image_of = None if self.reads_questions else samples.get("image_index")
        image_of = None if image_of is None else image_of.cpu()  # read before the encoders are waited for
        soft_prompt = self._of_images(samples)
        if "answer" in samples:
            contexts = self._question_contexts(samples)
            rows, answers, row_weights = answers_of(samples, draw=self.answer_loss == "sample" and self.training)
            image_of = rows if image_of is None else image_of[rows]
            text = answer_batch(self.opt_tokenizer, [contexts[i] for i in rows.tolist()], answers, self.device)
        else:
            row_weights, text = None, self._told(samples)
        return self._language_loss(soft_prompt, text, row_weights, image_of)

    # ------------------------------------------------------------ generation

    @torch.no_grad()
    def generate(
        self,
        samples: Dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 0,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1,
        return_scores: bool = False,
    ) -> Union[List[str], List[ScoredAnswer]]:
        """Continue a prompt (``samples["prompt"]``, one for all or a list; else the model's) for each image.

        Args:
            samples: ``image`` (b, 3, H, H), optionally ``prompt``.
            use_nucleus_sampling: sample with ``top_p`` and ``temperature`` instead of beam search.
            max_length: most new tokens, the prompt not counted.
            min_length: fewest new tokens in front of the closing newline, as in LAVIS main; LAVIS 1.0.2's 1 is this 0.
            num_captions: captions for each image.
            return_scores: also say how likely the model finds each text.

        Returns:
            b * num_captions strings, the captions of an image together; with ``return_scores`` as `ScoredAnswer`.
        """
        contexts = self._begun(samples)
        search = Search(
            max_new_tokens=max_length,
            num_beams=1 if use_nucleus_sampling else num_beams,
            min_new_tokens=min_length,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            num_return_sequences=num_captions,
            sample=use_nucleus_sampling,
            top_p=top_p,
            temperature=temperature,
        )
        return self._continue(self.soft_prompts(samples), contexts, search, return_scores)

    @torch.no_grad()
    def predict_answers(
        self,
        samples: Dict[str, Any],
        num_beams: int = 5,
        inference_method: str = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: Optional[List[str]] = None,
        prompt: Prompt = "",
        length_penalty: float = 0,
        use_nucleus_sampling: bool = False,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        temperature: float = 1,
        return_scores: bool = False,
        **kwargs: Any,
    ) -> Union[List[str], List[ScoredAnswer]]:
        """Answer ``samples["text_input"]`` (a question, or one for each image) about ``samples["image"]``, behind its
        ``history`` (pairs of question and answer for each sample) where there is one.

        Args:
            prompt: frame of the question, with ``{}`` in its place; one for all or a list. Empty takes
                ``samples["prompt"]``, else the model's prompt if it has a ``{}``, else the bare question.
            inference_method: ``generate`` writes an answer; ``rank`` takes the likeliest of ``answer_list``.
            num_beams, max_len, min_len, …: of generation, as in `generate`; lengths are of new tokens.
            num_ans_candidates, answer_list: see `rank_answers`.
            return_scores: also say how likely the model finds each answer.

        Returns:
            b answers; with ``return_scores`` as `ScoredAnswer`.

        Raises:
            ValueError: for an empty question, counts of questions, prompts and images that differ, an unknown
                ``inference_method``, or ranking without candidates.
        """
        if inference_method not in INFERENCE_METHODS:
            raise ValueError(f"inference_method: expected one of {INFERENCE_METHODS}, got {inference_method!r}")
        contexts = self._question_contexts(samples, prompt)
        soft_prompt = self.soft_prompts(samples, asked=True)
        if inference_method == "rank":
            with self.autocast_for(self.opt_model):
                ranked = rank_answers(
                    *(self.opt_model, self.opt_tokenizer, self.into_language_model(soft_prompt)[0], contexts),
                    *(answer_list or [], num_ans_candidates),
                    seeing=lambda rows: self.into_language_model(soft_prompt[rows])[1],
                )
            return ranked if return_scores else [answer.answer for answer in ranked]
        search = Search(
            max_new_tokens=max_len,
            num_beams=1 if use_nucleus_sampling else num_beams,
            min_new_tokens=min_len,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            sample=use_nucleus_sampling,
            top_p=top_p,
            temperature=temperature,
        )
        return self._continue(soft_prompt, contexts, search, return_scores)

    # ------------------------------------------------------------ features

    @torch.no_grad()
    def extract_features(self, samples: Dict[str, Any], mode: str = "image") -> BlipOutputFeatures:
        """The Q-Former's view of the images.

        Returns:
            LAVIS's ``BlipOutputFeatures`` with ``image_embeds`` (b, q, hidden), the query outputs, and
            ``image_embeds_proj`` (b, q, opt width), the soft prompt; None where there is none.

        Raises:
            ValueError: for another mode; text features need a stage-1 model.
        """
        if mode != "image":
            raise ValueError(f"mode: expected 'image' (this model embeds no text), got {mode!r}")
        query_output, soft_prompt = self.encode(samples)
        return BlipOutputFeatures(
            image_embeds=query_output.last_hidden_state,
            image_embeds_proj=None if self.opt_proj is None else soft_prompt,
        )

    def attention_maps(self, samples: Dict[str, Any]) -> attention_maps.AttentionMaps:
        """Where the model looks, and what its answers were made of: see `lavis_kvmod.models.attention_maps`."""
        return attention_maps.attention_maps(self, samples)
