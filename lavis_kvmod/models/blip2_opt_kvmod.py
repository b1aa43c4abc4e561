"""BLIP-2 OPT with two vision encoders: ``blip2_opt_kvmod``.

    image ─► EVA-CLIP-G ─► ln_vision ─► visual tokens ─┐
      └────► EfficientNet ─► pooled ─► KV prefix ──────┴─► Q-Former ─► opt_proj ─► soft prompt ─► OPT

`encode` is that figure; ``forward``, ``generate``, ``predict_answers`` and ``extract_features`` all stand on it. They
take and give what LAVIS's ``blip2_opt`` does (``lavis/models/blip2_models/blip2_opt.py``, and LAVIS main for
``predict_answers``). Without KV modulation the model equals stock BLIP-2.
"""

import contextlib
import logging
import random
import re
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from lavis.models.blip2_models.blip2 import Blip2Base
from lavis.models.blip_models.blip_outputs import BlipOutputFeatures
from torch import Tensor, nn

from lavis_kvmod.models.connectors.kv_prefix import KVPrefix, KVPrefixGenerator
from lavis_kvmod.models.connectors.qformer import QFormer, QFormerOutput
from lavis_kvmod.models.empty import empty_weights
from lavis_kvmod.models.language.opt import FrozenOPT, build_language_model
from lavis_kvmod.models.language.soft_prompt import ScoredAnswer, continue_texts, rank_answers, score, token_losses
from lavis_kvmod.models.language.text import (
    QUESTION,
    Prompt,
    answer_batch,
    caption_batch,
    one_each,
    question_contexts,
)
from lavis_kvmod.models.optimizer_groups import optimizer_groups
from lavis_kvmod.models.parts import PartSummary, summarise
from lavis_kvmod.models.settings import ANSWER_LOSSES, PREFIX_GATES, ModelSettings
from lavis_kvmod.models.vision.auxiliary import AuxiliaryEncoder, build_auxiliary_encoder
from lavis_kvmod.models.vision.encoders import build_vision_encoder, interpolate_positions
from lavis_kvmod.models.vision.feature_cache import FrozenFeatureCache, FrozenFeatures
from lavis_kvmod.system.paths import resource
from lavis_kvmod.system.precision import cpu_has_bf16, frozen_dtype_on_cpu
from lavis_kvmod.weights import files, finding, reading

# What stage 1 of BLIP-2 trains beside the Q-Former's query side (lavis/models/blip2_models/blip2_qformer.py).
_STAGE_1_ONLY = re.compile(
    r"Qformer\.(cls|bert\.embeddings\.(word|position)_embeddings|bert\.encoder\.layer\.\d+\.(intermediate|output))\."
    r"|(vision_proj|text_proj|itm_head)\.|temp$"
)


INFERENCE_METHODS = ("generate", "rank")


def _answer_rng(epoch: Optional[int], question: str, answers: List[str]) -> random.Random:
    """Draws an answer to train on. Within a run, which tells the epoch, the draw hangs on the question alone, not on
    how the data is spread over processes or where a run was resumed."""
    if epoch is None:
        return random.Random(int(torch.randint(2**62, ())))
    return random.Random(f"{epoch} {question} {answers}")


class Encoded(NamedTuple):
    """A batch of images on its way: the Q-Former's output, and the soft prompt (b, q, opt width)."""

    query_output: QFormerOutput
    soft_prompt: Tensor


class Blip2OPTKVMod(Blip2Base):
    """BLIP-2 (arXiv 2301.12597) whose Q-Former also attends to a Key/Value prefix written by a second encoder.

    Trained: ``kv_prefix`` (and ``kv_gate``), ``Qformer`` with ``query_tokens``, ``opt_proj``. Frozen: the ViT with
    ``ln_vision``, the auxiliary encoder, OPT. Use `from_config` or LAVIS's ``load_model`` to build one.

    Args:
        visual_encoder: ViT, (b, 3, H, H) -> (b, n, width).
        ln_vision: the LayerNorm BLIP-2 puts behind it.
        qformer: Q-Former over visual tokens of that width.
        num_query_token: how many query tokens, and so soft-prompt vectors.
        opt_model, opt_tokenizer: the frozen language model (the tokenizer may be None in a model only to be counted).
        kv_prefix, aux_encoder: prefix generator and the encoder it reads; both None for stock BLIP-2.
        prefix_gate: ``none`` concatenates the prefix, ``tanh`` adds it behind a gate that starts at 0.
        prompt: put in front of captions; with ``{}``, the frame of a question.
        max_txt_len: most tokens of a caption, or of a prompt with its question.
        answer_loss: ``sample`` draws one answer a question by weight, ``all`` takes all, weighted.
        freeze_vit: False also trains the ViT and ``ln_vision`` (LAVIS's captioning recipe).
        image_size: side of the input image in pixels, as the ViT was built.
        cache_frozen_features: see `FrozenFeatureCache`.

    Raises:
        ValueError: for an unknown ``prefix_gate`` or ``answer_loss``, or a prefix without its encoder.
    """

    PRETRAINED_MODEL_CONFIG_DICT = {
        name: f"configs/models/blip2_opt_kvmod/{name}.yaml"
        for name in (
            "pretrain_opt2.7b",
            "pretrain_opt6.7b",
            "caption_coco_opt2.7b",
            "caption_coco_opt6.7b",
            "demo",
        )
    }
    default_model_type = "pretrain_opt2.7b"

    def __init__(
        self,
        *,
        visual_encoder: nn.Module,
        ln_vision: nn.Module,
        qformer: QFormer,
        num_query_token: int,
        opt_model: FrozenOPT,
        opt_tokenizer,
        kv_prefix: Optional[KVPrefixGenerator] = None,
        aux_encoder: Optional[AuxiliaryEncoder] = None,
        prefix_gate: str = "none",
        prompt: str = "",
        max_txt_len: int = 32,
        answer_loss: str = "sample",
        freeze_vit: bool = True,
        image_size: int = 224,
        cache_frozen_features: bool = False,
    ):
        super().__init__()
        if (kv_prefix is None) != (aux_encoder is None):
            raise ValueError("kv_prefix and aux_encoder belong together: give both or neither")
        if prefix_gate not in PREFIX_GATES:
            raise ValueError(f"prefix_gate: expected one of {PREFIX_GATES}, got {prefix_gate!r}")
        if answer_loss not in ANSWER_LOSSES:
            raise ValueError(f"answer_loss: expected one of {ANSWER_LOSSES}, got {answer_loss!r}")

        # Names and order as in LAVIS's Blip2OPT: they are the names in its checkpoints.
        self.query_tokens = nn.Parameter(torch.empty(1, num_query_token, qformer.hidden_size))
        nn.init.normal_(self.query_tokens, std=0.02)
        self.visual_encoder = visual_encoder
        self.ln_vision = ln_vision
        self.Qformer = qformer
        self.opt_model = opt_model
        self.opt_proj = nn.Linear(qformer.hidden_size, opt_model.config.word_embed_proj_dim)

        self.kv_prefix = kv_prefix
        self.aux_encoder = aux_encoder
        if kv_prefix is not None and prefix_gate == "tanh":
            # One gate a head and layer; closed at first, so that training starts from stock BLIP-2.
            gates = torch.zeros(qformer.num_cross_attention_layers, qformer.num_attention_heads)
            self.kv_gate = nn.Parameter(gates)
        else:
            self.kv_gate = None

        self.opt_tokenizer = opt_tokenizer
        if opt_tokenizer is not None:  # None only in a model that is there to be counted
            self.eos_token_id = opt_tokenizer("\n", add_special_tokens=False).input_ids[0]
        self.prompt = prompt
        self.max_txt_len = max_txt_len
        self.answer_loss = answer_loss
        self.freeze_vit = freeze_vit
        self.image_size = image_size
        self.feature_cache = FrozenFeatureCache() if cache_frozen_features else None
        # ln_vision is frozen but has no file of its own: it comes with the ViT handed in, or with a checkpoint.
        self._ln_vision_loaded = True
        self._freeze()

    # ------------------------------------------------------------ what is trained

    @property
    def trained_parts(self) -> Tuple[str, ...]:
        """Attribute names of the parts that are trained."""
        parts = ["kv_prefix", "kv_gate", "Qformer", "query_tokens", "opt_proj"]
        if not self.freeze_vit:
            parts += ["visual_encoder", "ln_vision"]
        return tuple(part for part in parts if getattr(self, part) is not None)

    def _freeze(self) -> None:
        self.requires_grad_(False)
        for part in self.trained_parts:
            getattr(self, part).requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Blip2OPTKVMod":
        """Set training mode; frozen parts stay in eval mode (no dropout, no BatchNorm update)."""
        super().train(mode)
        if self.freeze_vit:
            self.visual_encoder.eval()
            self.ln_vision.eval()
        return self

    def parts(self) -> List[PartSummary]:
        """The model's parts in the figure's order: see `PartSummary`."""
        order = ["visual_encoder", "ln_vision", "aux_encoder", "kv_prefix", "kv_gate"]
        order += ["query_tokens", "Qformer", "opt_proj", "opt_model"]
        return [summarise(name, getattr(self, name)) for name in order if getattr(self, name) is not None]

    def get_optimizer_params(
        self, weight_decay: float, lr_scale: float = 1.0, kv_lr_scale: float = 1.0
    ) -> List[Dict[str, Any]]:
        """LAVIS main's hook for the optimiser (``lr_scale`` is its layer-wise decay): see `optimizer_groups`."""
        return optimizer_groups(self, weight_decay=weight_decay, vit_layer_decay=lr_scale, kv_lr_scale=kv_lr_scale)

    # ------------------------------------------------------------ image -> soft prompt

    def encode(self, samples: Dict[str, Any], output_attentions: bool = False) -> Encoded:
        """The figure above: ``samples["image"]`` (b, 3, H, H) -> soft prompt (b, q, opt width).

        Raises:
            ValueError: if the images have another shape than the ViT was built for.
        """
        with self.maybe_autocast():
            features = self._frozen_features(samples)
            query_output = self.Qformer(
                query_embeds=self.query_tokens.expand(len(features.visual_tokens), -1, -1),
                encoder_hidden_states=features.visual_tokens,
                prefix=self._prefix(features.pooled),
                output_attentions=output_attentions,
            )
            soft_prompt = self.opt_proj(query_output.last_hidden_state)  # (b, q, opt width)
        return Encoded(query_output, soft_prompt)

    def _frozen_features(self, samples: Dict[str, Any]) -> FrozenFeatures:
        image = samples["image"]
        expected = (3, self.image_size, self.image_size)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"expected images (b, {', '.join(map(str, expected))}), got {tuple(image.shape)}: the image "
                f"processor's image_size and model.image_size must agree"
            )
        keys = samples.get("image_key")
        if self.feature_cache is None or keys is None:
            return self._encode_frozen(image)
        return self.feature_cache(keys, image, self._encode_frozen)

    def _encode_frozen(self, image: Tensor) -> FrozenFeatures:
        """(b, 3, H, H) -> visual tokens (b, n, width), pooled auxiliary features (b, f) or None."""
        with torch.no_grad() if self.freeze_vit else contextlib.nullcontext():
            visual_tokens = self.ln_vision(self.visual_encoder(image))
        pooled = None if self.aux_encoder is None else self.aux_encoder(image)
        return FrozenFeatures(visual_tokens, pooled)

    def _prefix(self, pooled: Optional[Tensor]) -> Optional[List[KVPrefix]]:
        """Pooled features (b, f) -> one prefix for each cross-attention layer, or None without KV modulation."""
        if self.kv_prefix is None:
            return None
        c = self.Qformer.num_cross_attention_layers
        key, value = self.kv_prefix(pooled, own_softmax=self.kv_gate is not None)
        if key.ndim == 4:  # one prefix, shared by all layers
            key, value = key.expand(c, *key.shape), value.expand(c, *value.shape)
        gates = [None] * c if self.kv_gate is None else self.kv_gate.tanh()
        return [KVPrefix(*of_layer) for of_layer in zip(key, value, gates)]

    def maybe_autocast(self, dtype: torch.dtype = torch.float16):
        """As LAVIS, autocast on a GPU and none on the CPU; but in bfloat16, and then on both, if a tower is stored so.

        A surrounding autocast (the runner's) stays in force.
        """
        device_type = self.device.type
        in_bf16 = self.stored_in_bf16
        if torch.is_autocast_enabled(device_type) or (device_type == "cpu" and not in_bf16):
            return contextlib.nullcontext()
        return torch.autocast(device_type, dtype=torch.bfloat16 if in_bf16 else dtype)

    @property
    def stored_in_bf16(self) -> bool:
        """Whether the ViT or OPT has weights in bfloat16, which then all is computed in."""
        towers = (self.opt_model, self.visual_encoder)
        return any(p.dtype is torch.bfloat16 for tower in towers for p in tower.parameters())

    def float(self) -> "Blip2OPTKVMod":
        """What LAVIS's ``load_model`` calls for the CPU: trained parameters in float32, frozen half-precision ones in
        bfloat16 where the processor has it (float32 would double their memory), else in float32."""
        has_bf16 = cpu_has_bf16()
        for parameter in self.parameters():
            target = torch.float32 if parameter.requires_grad else frozen_dtype_on_cpu(parameter.dtype, has_bf16)
            parameter.data = parameter.data.to(target)
        return self

    # ------------------------------------------------------------ training

    def forward(self, samples: Dict[str, Any]) -> Dict[str, Tensor]:
        """The loss of a batch.

        Args:
            samples: ``image`` (b, 3, H, H) and ``text_input``. For captioning, ``text_input`` is the b captions. For
                VQA it is the b questions, with ``answer`` (all answers of all questions in one list), ``n_answers``
                (b,) and ``weight`` (one for each answer), as LAVIS's collater gives them. ``prompt`` may replace
                the model's own, for all or one for each sample.

        Returns:
            ``loss``: mean cross-entropy over the tokens to be predicted, which are the captions after the prompt, or
            the answers alone with their closing newline. ``loss_weight``: how many those are, or their weights' sum,
            so that means of several batches can be put together. In eval mode all answers of a question count, as
            with ``answer_loss: all``.

        Raises:
            ValueError: for wrong shapes, an empty question, answer or caption, or a question without answers.
        """
        soft_prompt = self.encode(samples).soft_prompt
        if "answer" in samples:
            contexts = self._question_contexts(samples)
            rows, answers, row_weights = self._answers(samples)
            soft_prompt = soft_prompt[rows]
            text = answer_batch(self.opt_tokenizer, [contexts[i] for i in rows.tolist()], answers, self.device)
        else:
            row_weights = None
            text = caption_batch(
                self.opt_tokenizer,
                samples["text_input"],
                samples.get("prompt", self.prompt),
                self.max_txt_len,
                self.device,
            )
        return self._language_loss(soft_prompt, text, row_weights)

    def _answers(self, samples) -> Tuple[Tensor, List[str], Optional[Tensor]]:
        """Which question each answer in the loss belongs to, the answers, and their weights (None: all 1)."""
        counts = [int(n) for n in samples["n_answers"]]
        answers, weight = samples["answer"], samples["weight"].float().cpu()
        if sum(counts) != len(answers) or len(weight) != len(answers):
            raise ValueError(
                f"expected one weight for each answer and as many answers as n_answers says; got "
                f"{len(answers)} answers, {len(weight)} weights, n_answers adding up to {sum(counts)}"
            )
        if 0 in counts:
            raise ValueError(f"sample {counts.index(0)} of the batch has no answer to train on")
        if self.answer_loss == "all" or not self.training:
            rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
            return rows, answers, weight.to(self.device)
        drawn, start = [], 0
        for question, count in zip(samples["text_input"], counts):
            choices = slice(start, start + count)
            of_question = weight[choices].clamp(min=0).tolist()
            if not sum(of_question) > 0:
                of_question = [1.0] * count
            rng = _answer_rng(samples.get("epoch"), question, answers[choices])
            drawn += rng.choices(answers[choices], of_question)
            start += count
        return torch.arange(len(counts)), drawn, None

    def _language_loss(self, soft_prompt: Tensor, text, row_weights: Optional[Tensor]) -> Dict[str, Tensor]:
        """Weighted mean cross-entropy over the labelled tokens of ``text``, and the sum of those weights."""
        with self.maybe_autocast():
            row, token_loss = token_losses(self.opt_model, soft_prompt, text)
        if row_weights is None:
            return {"loss": token_loss.mean(), "loss_weight": token_loss.new_tensor(len(token_loss))}
        token_weights = row_weights[row]
        return {
            "loss": (token_weights * token_loss).sum() / token_weights.sum(),
            "loss_weight": token_weights.sum(),
        }

    # ------------------------------------------------------------ generation

    @torch.no_grad()
    def generate(
        self,
        samples: Dict[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
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
            min_length: fewest tokens, the prompt's counted, as in LAVIS.
            num_captions: captions for each image.
            return_scores: also say how likely the model finds each text.

        Returns:
            b * num_captions strings, the captions of an image together; with ``return_scores`` as `ScoredAnswer`.
        """
        prompts = one_each(samples.get("prompt", self.prompt), len(samples["image"]))
        contexts = [self.opt_tokenizer(prompt).input_ids for prompt in prompts]
        return self._continue(
            self.encode(samples).soft_prompt,
            contexts,
            return_scores,
            do_sample=use_nucleus_sampling,
            top_p=top_p,
            temperature=temperature,
            num_beams=1 if use_nucleus_sampling else num_beams,
            max_new_tokens=max_length,
            min_length=min_length,
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            num_return_sequences=num_captions,
        )

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
        return_scores: bool = False,
        **kwargs,
    ) -> Union[List[str], List[ScoredAnswer]]:
        """Answer ``samples["text_input"]`` (a question, or one for each image) about ``samples["image"]``.

        Args:
            prompt: frame of the question, with ``{}`` in its place; one for all or a list. Empty takes
                ``samples["prompt"]``, else the model's prompt if it has a ``{}``, else the bare question.
            inference_method: ``generate`` writes an answer; ``rank`` takes the likeliest of ``answer_list``.
            num_beams, max_len, min_len, length_penalty: of generation; ``max_len`` is the most new tokens.
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
        soft_prompt = self.encode(samples).soft_prompt
        if inference_method == "rank":
            with self.maybe_autocast():
                ranked = rank_answers(
                    self.opt_model, self.opt_tokenizer, soft_prompt, contexts, answer_list or [], num_ans_candidates
                )
            return ranked if return_scores else [answer.answer for answer in ranked]
        return self._continue(
            soft_prompt,
            contexts,
            return_scores,
            do_sample=False,
            num_beams=num_beams,
            max_new_tokens=max_len,
            min_length=min_len,
            length_penalty=length_penalty,
        )

    def _question_contexts(self, samples, prompt: Prompt = "") -> List[List[int]]:
        """Token ids of each question in its prompt: the same in training and in evaluation."""
        questions = samples["text_input"]
        if isinstance(questions, str):
            questions = [questions] * len(samples["image"])
        if len(questions) != len(samples["image"]):
            raise ValueError(f"{len(samples['image'])} images but {len(questions)} questions")
        prompt = prompt or samples.get("prompt") or (self.prompt if QUESTION in self.prompt else "")
        return question_contexts(self.opt_tokenizer, questions, prompt, self.max_txt_len)

    def _continue(self, soft_prompt: Tensor, contexts: List[List[int]], return_scores: bool, **search):
        """Let OPT continue each context behind its soft prompt up to the newline; returns what it adds."""
        tokenizer = self.opt_tokenizer
        with self.maybe_autocast():
            added = continue_texts(self.opt_model, tokenizer, soft_prompt, contexts, stop=self.eos_token_id, **search)
        texts = [text.strip() for text in tokenizer.batch_decode(added, skip_special_tokens=True)]
        if not return_scores:
            return texts
        each = len(added) // len(contexts)
        contexts = [context for context in contexts for _ in range(each)]
        with self.maybe_autocast():
            log_probs = score(self.opt_model, tokenizer, soft_prompt.repeat_interleave(each, dim=0), contexts, added)
        return [ScoredAnswer(*row) for row in zip(texts, log_probs, map(len, added))]

    # ------------------------------------------------------------ features

    @torch.no_grad()
    def extract_features(self, samples: Dict[str, Any], mode: str = "image") -> BlipOutputFeatures:
        """The Q-Former's view of the images.

        Returns:
            LAVIS's ``BlipOutputFeatures`` with ``image_embeds`` (b, q, hidden), the query outputs, and
            ``image_embeds_proj`` (b, q, opt width), the soft prompt.

        Raises:
            ValueError: for another mode; text features need a stage-1 model.
        """
        if mode != "image":
            raise ValueError(f"mode: expected 'image' (this model embeds no text), got {mode!r}")
        encoded = self.encode(samples)
        return BlipOutputFeatures(
            image_embeds=encoded.query_output.last_hidden_state,
            image_embeds_proj=encoded.soft_prompt,
        )

    @torch.no_grad()
    def prefix_attention_share(self, samples: Dict[str, Any]) -> Optional[float]:
        """How much of its attention the Q-Former gives to the prefix, in [0, 1]; None without KV modulation.

        The mean over images, cross-attention layers, heads and queries. With a gate, whose two softmaxes each sum to
        one, it is |tanh(g)| / (1 + |tanh(g)|).
        """
        if self.kv_prefix is None:
            return None
        maps = torch.stack(self.encode(samples, output_attentions=True).query_output.cross_attentions).float().abs()
        of_prefix = maps[..., : self.kv_prefix.prefix_tokens.shape[0]].sum(-1)
        return (of_prefix / maps.sum(-1)).mean().item()

    # ------------------------------------------------------------ weights

    def load_checkpoint(self, url_or_filename: str) -> reading.LoadReport:
        """Load a BLIP-2 checkpoint: LAVIS's or ours (``.pth``, ``.safetensors``), or a Hugging Face folder.

        It must hold all that is trained here. What may be missing, each as a whole: a frozen tower (it comes from a
        file of its own), ``ln_vision`` once it was loaded, and the prefix (a stock BLIP-2 checkpoint has none). From
        a stage-1 checkpoint (LAVIS's ``blip2_pretrained.pth``) the text side is left out and ``opt_proj`` stays new.
        A tower that it does hold, as a Hugging Face folder does, takes the place of the one from its own file.

        Raises:
            FileNotFoundError, CheckpointError: if it cannot be read, or listing the keys that do not fit.
        """
        file = finding.WeightFile("checkpoint", str(url_or_filename), "the checkpoint argument").fetch()
        return self._load_weights(reading.read_weights(file), file)

    load_from_pretrained = load_checkpoint

    def _load_weights(self, state: files.StateDict, source) -> reading.LoadReport:
        """`load_checkpoint`, of what was read from ``source``."""
        state = self._at_image_size(self._within_vocabulary(state))
        groups = ["visual_encoder.", "opt_model.", "aux_encoder.", "kv_"]
        if self._ln_vision_loaded:
            groups.append("ln_vision.")
        if "itm_head.weight" in state:  # stage 1
            groups.append("opt_proj.")
            state = {key: value for key, value in state.items() if not _STAGE_1_ONLY.match(key)}
        absent = tuple(g for g in groups if not any(key.startswith(g) for key in state))
        may_lack = {key for key in self.state_dict() if key.startswith(absent)}
        may_lack |= {name for name, _ in self.named_buffers()}
        report = reading.load_weights(self, state, source=source, may_lack=may_lack)
        self._ln_vision_loaded = True
        if self.feature_cache is not None:
            self.feature_cache.clear()
        logging.info("loaded checkpoint %s", source)
        return report

    def _within_vocabulary(self, state: files.StateDict) -> files.StateDict:
        """``state`` with OPT's embeddings cut to this model's rows: Hugging Face adds some, for an image token."""
        rows = self.opt_model.get_input_embeddings().num_embeddings
        of_opt = ("opt_model.model.decoder.embed_tokens.weight", "opt_model.lm_head.weight")
        return {key: value[:rows] if key in of_opt else value for key, value in state.items()}

    def _at_image_size(self, state: files.StateDict) -> files.StateDict:
        """``state`` with the ViT's position embedding, if it holds one, brought to this model's image size."""
        vit = {
            key[len("visual_encoder.") :]: value for key, value in state.items() if key.startswith("visual_encoder.")
        }
        interpolate_positions(self.visual_encoder, vit)
        return {**state, **{f"visual_encoder.{key}": value for key, value in vit.items()}}

    @classmethod
    def default_config_path(cls, model_type: str) -> str:
        """Absolute path of a model type's YAML.

        Raises:
            ValueError: for an unknown type, naming the known ones.
        """
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            known = ", ".join(cls.PRETRAINED_MODEL_CONFIG_DICT)
            raise ValueError(f"model_type: expected one of {known}; got {model_type!r}")
        return str(resource(cls.PRETRAINED_MODEL_CONFIG_DICT[model_type]))

    @classmethod
    def from_config(cls, cfg) -> "Blip2OPTKVMod":
        """Build from a ``model:`` section: frozen towers from their files, then the checkpoint it names.

        Raises:
            SettingsError: listing all faults of the section.
            MissingWeightsError: listing all weights that cannot be had, before any is loaded.
        """
        settings = ModelSettings.from_config(cfg)
        finding.require(settings.weight_files())
        model = cls._assemble(settings)
        model._load_named_checkpoint(settings)
        return model

    @classmethod
    def without_weights(cls, cfg) -> "Blip2OPTKVMod":
        """The model of a ``model:`` section without memory for its weights: for counting, not for running.

        Raises:
            SettingsError: as `from_config`.
            MissingWeightsError: if the language model's size is not known.
        """
        with empty_weights():
            return cls._assemble(ModelSettings.from_config(cfg), load=False)

    @classmethod
    def _assemble(cls, settings: ModelSettings, load: bool = True) -> "Blip2OPTKVMod":
        """The parts that the settings describe, put together; frozen towers with their weights if ``load``."""
        vit_precision = settings.vit_precision
        if not settings.freeze_vit and vit_precision != "fp32":
            logging.info(
                "the ViT is trained (freeze_vit: false), so its weights are fp32, not %s: half precision loses small "
                "updates, and fp16 gradients cannot be unscaled",
                vit_precision,
            )
            vit_precision = "fp32"
        vision = build_vision_encoder(
            settings.vit_model,
            checkpoint=settings.vit_checkpoint,
            image_size=settings.image_size,
            drop_path_rate=settings.drop_path_rate,
            use_grad_checkpoint=settings.use_grad_checkpoint,
            precision=vit_precision,
            geometry=settings.vit_geometry,
            load=load,
        )
        opt_model, opt_tokenizer = build_language_model(
            settings.opt_model,
            precision=settings.opt_precision,
            use_grad_checkpoint=settings.opt_grad_checkpoint,
            load=load,
        )
        qformer = QFormer(
            encoder_width=vision.visual_encoder.num_features,
            num_queries=settings.num_query_token,
            **settings.qformer_geometry,
        )
        kv_prefix = aux_encoder = None
        if settings.kv_modulation:
            aux_encoder = build_auxiliary_encoder(
                settings.aux_encoder, settings.aux_checkpoint, settings.aux_image_size, load=load
            )
            per_layer = settings.prefix_sharing == "per_layer"
            kv_prefix = KVPrefixGenerator(
                feature_dim=aux_encoder.feature_dim,
                hidden_size=qformer.hidden_size,
                num_prefix_tokens=settings.num_prefix_tokens,
                num_heads=qformer.num_attention_heads,
                num_layers=qformer.num_cross_attention_layers if per_layer else None,
            )
        model = cls(
            visual_encoder=vision.visual_encoder,
            ln_vision=vision.ln_vision,
            qformer=qformer,
            num_query_token=settings.num_query_token,
            opt_model=opt_model,
            opt_tokenizer=opt_tokenizer,
            kv_prefix=kv_prefix,
            aux_encoder=aux_encoder,
            prefix_gate=settings.prefix_gate,
            prompt=settings.prompt,
            max_txt_len=settings.max_txt_len,
            answer_loss=settings.answer_loss,
            freeze_vit=settings.freeze_vit,
            image_size=settings.image_size,
            cache_frozen_features=settings.cache_frozen_features,
        )
        model._ln_vision_loaded = vision.ln_vision_loaded
        return model

    def _load_named_checkpoint(self, settings: ModelSettings) -> None:
        """Load ``finetuned`` or ``pretrained``; ours holds no ``ln_vision``, which then comes from ``pretrained``."""
        checkpoint = settings.checkpoint()
        if checkpoint is None:
            logging.info("no checkpoint named: the Q-Former starts from random weights")
            return
        file = checkpoint.fetch()
        state = reading.read_weights(file)
        has_ln_vision = self._ln_vision_loaded or any(key.startswith("ln_vision.") for key in state)
        if settings.load_finetuned and settings.pretrained and not has_ln_vision:
            self.load_checkpoint(settings.pretrained)
        self._load_weights(state, file)
