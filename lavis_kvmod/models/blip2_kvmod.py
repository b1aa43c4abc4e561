"""BLIP-2's first stage with two vision encoders: ``blip2_kvmod``.

    image ─► encoders ─► visual tokens, KV prefix ─► Q-Former (queries) ─► vision_proj ─┐
                                                        │  shared layers                ├─ contrastive (ITC)
    text ──────────────────────────────────────────► Q-Former (text) ───► text_proj ────┘
                                     queries and text together ─► itm_head ─► matching (ITM)
                                     text behind the queries ───► word head ─► captioning (ITG), masked words (MLM)

It takes and gives what LAVIS's ``blip2``, ``blip2_feature_extractor`` and ``blip2_image_text_matching`` do
(``lavis/models/blip2_models/blip2_qformer.py``). Without KV modulation it equals them.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from lavis.models.blip_models.blip_outputs import BlipOutput, BlipOutputFeatures
from torch import Tensor, nn

from lavis_kvmod.models import build
from lavis_kvmod.models.base import KVModBase, model_type_files
from lavis_kvmod.models.connectors.kv_prefix import KVPrefix, PrefixGenerator, prefix_of_each_layer
from lavis_kvmod.models.connectors.qformer import QFormerOutput
from lavis_kvmod.models.momentum import FeatureQueue, MomentumWeights
from lavis_kvmod.models.objectives import (
    Identity,
    Loss,
    Similarities,
    belonging,
    captioning_loss,
    contrastive_loss,
    draw_hard_negatives,
    mask_words,
    masked_words_loss,
    matching_loss,
    similarities,
)
from lavis_kvmod.models.settings import Stage1Settings
from lavis_kvmod.models.sim_matrix import compute_sim_matrix
from lavis_kvmod.models.vision.auxiliary import Auxiliary
from lavis_kvmod.models.vision.feature_cache import FrozenFeatures
from lavis_kvmod.system.distributed import all_reduce_tensor, gather_rows, get_rank, get_world_size
from lavis_kvmod.weights.reading import LoadReport

__all__ = ["Blip2KVMod", "Blip2KVModITM", "Stage1Output"]

MODES = ("multimodal", "text", "image")
# Parts that a momentum model follows; it reads the same frozen features.
_FOLLOWED = ("Qformer", "query_tokens", "kv_prefix", "kv_gate", "vision_proj", "text_proj")


class Texts(NamedTuple):
    """Tokens of a batch of texts: ids and attention mask (b, t), 1 for tokens and 0 for padding."""

    token_ids: Tensor
    mask: Tensor


class Encoded(NamedTuple):
    """A batch of images on its way: the Q-Former's output."""

    query_output: QFormerOutput


class PairsOfBatch(NamedTuple):
    """This rank's features (b, q, e) and (b, e), what they are of, and which of all ranks' samples belong to them."""

    image: Tensor
    text: Tensor
    positives: Tensor
    mine: Identity
    everyone: Identity


@dataclass
class Stage1Output(BlipOutput):
    """LAVIS's output with the loss on masked words beside its three; of objectives that are off, None."""

    loss_mlm: Optional[Tensor] = None


class Blip2KVMod(KVModBase):
    """BLIP-2's Q-Former with its text side and the KV prefix in its cross-attention, without a language model.

    Trained: ``kv_prefix`` (and ``kv_gate``), ``Qformer`` with ``query_tokens``, the two projections, ``itm_head`` and
    the temperature ``temp``. Frozen: the image encoder with ``ln_vision``, the auxiliary encoder.

    Args:
        tokenizer: BERT's, with ``[DEC]`` as BOS (None in a model only to be counted).
        embed_dim: width of the space in which images and texts are compared.
        max_txt_len: most tokens of a text; what is longer is cut.
        objectives: weight of each of ``itc``, ``itm``, ``itg``, ``mlm``; 0 turns one off.
        own_pairs_only: count equal texts, and other captions of the same image, as negatives, as LAVIS does.
        momentum_queue: samples kept to be compared with; 0 trains without a momentum model.
        momentum_rate, momentum_alpha: how much the momentum model keeps of itself; its share of the targets.
        image_side: see `KVModBase`.
    """

    PRETRAINED_MODEL_CONFIG_DICT = model_type_files("blip2_kvmod", "pretrain", "coco", "demo")
    default_model_type = "pretrain"
    settings_class = Stage1Settings
    of_this_training = ("momentum.", "queue.")
    # ln_vision: where a run starts from BERT, no other file has the one that was trained with. The heads: an objective
    # that is off trains none.
    kept_in_training = (
        *of_this_training,
        "ln_vision.",
        "itm_head.",
        "Qformer.cls.",
        "vision_proj.",
        "text_proj.",
        "temp",
    )
    behind_qformer = {"vision_proj": True, "text_proj": True, "itm_head": True, "temp": True}

    def __init__(
        self,
        *,
        tokenizer: Any,
        embed_dim: int = 256,
        max_txt_len: int = 32,
        objectives: Optional[Mapping[str, float]] = None,
        own_pairs_only: bool = False,
        momentum_queue: int = 0,
        momentum_rate: float = 0.995,
        momentum_alpha: float = 0.4,
        kv_prefix: Optional[PrefixGenerator] = None,
        aux_encoder: Optional[Auxiliary] = None,
        prefix_gate: str = "none",
        **image_side: Any,
    ):
        super().__init__(**image_side)
        hidden_size = self.Qformer.hidden_size
        self.vision_proj = nn.Linear(hidden_size, embed_dim)
        self.text_proj = nn.Linear(hidden_size, embed_dim)
        self.itm_head = nn.Linear(hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self._add_prefix(kv_prefix, aux_encoder, prefix_gate)
        self.tokenizer = tokenizer
        self.max_txt_len = max_txt_len
        self.objectives = {"itc": 1.0, "itm": 1.0, "itg": 1.0, "mlm": 0.0, **(objectives or {})}
        self.own_pairs_only = own_pairs_only
        self.momentum_alpha = momentum_alpha
        self.momentum: Optional[MomentumWeights] = None
        self.queue: Optional[FeatureQueue] = None
        self._freeze()
        self._freeze_heads()
        if momentum_queue:
            self.momentum = MomentumWeights(self._followed(), momentum_rate)
            self.queue = FeatureQueue(momentum_queue, self.query_tokens.shape[1], embed_dim)

    @classmethod
    def from_settings(cls, settings: Stage1Settings, load: bool = True) -> "Blip2KVMod":
        """The parts that the settings describe, put together; frozen towers with their weights if ``load``."""
        return cls(**build.stage_1_arguments(settings, load=load))

    def _freeze_heads(self) -> None:
        """Those of objectives that are off: several processes would wait for their gradients."""
        on, words = self.objectives, self.Qformer.bert.embeddings.word_embeddings.weight
        idle = [] if on["itc"] else [self.temp, *self.vision_proj.parameters(), *self.text_proj.parameters()]
        idle += [] if on["itm"] else self.itm_head.parameters()
        idle += [] if on["itg"] or on["mlm"] else self.Qformer.cls.parameters()
        for parameter in idle:
            parameter.requires_grad_(parameter is words)  # which the texts are read with, too

    def _followed(self) -> Dict[str, object]:
        return {name: getattr(self, name) for name in _FOLLOWED}

    def after_loading(self, report: LoadReport) -> None:
        """A momentum model that a checkpoint does not hold begins as the model it follows."""
        if self.momentum is not None and any(key.startswith("momentum.") for key in report.missing_keys):
            self.momentum.copy_from(self._followed())

    # ------------------------------------------------------------ encode

    def tokenise(self, texts: Sequence[str], *, padding: Union[bool, str] = True, whole: bool = False) -> Texts:
        """b texts -> ids and mask (b, t): ``[CLS] … [SEP]``, padded on the right. What is longer than ``max_txt_len``
        is cut; with ``whole`` only what is longer than the Q-Former has positions (LAVIS's fails there)."""
        length = self.Qformer.max_position_embeddings if whole else self.max_txt_len
        tokens = self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        return Texts(tokens.input_ids, tokens.attention_mask)

    def encode(self, samples: Dict[str, Any], output_attentions: bool = False) -> Encoded:
        """``samples["image"]`` (b, 3, H, H) -> the queries' hidden states (b, q, hidden)."""
        return Encoded(self._see(self, self.features(samples), output_attentions=output_attentions))

    def features(self, samples: Mapping[str, Any]) -> FrozenFeatures:
        """What the frozen encoders make of the images, in the precision of what is trained."""
        return _each(lambda part: part.to(self.query_tokens.dtype), self.frozen_features(samples))

    def _see(self, bridge: Any, features: FrozenFeatures, **options: Any) -> QFormerOutput:
        """Queries over images, through this model's own bridge or the momentum model's."""
        return bridge.Qformer(
            query_embeds=bridge.query_tokens.expand(len(features.visual_tokens), -1, -1),
            encoder_hidden_states=features.visual_tokens,
            prefix=self._prefix(bridge, features.pooled),
            **options,
        )

    @staticmethod
    def _prefix(bridge: Any, pooled: Optional[Tensor]) -> Optional[List[KVPrefix]]:
        if pooled is None or bridge.kv_prefix is None:
            return None
        layers = bridge.Qformer.num_cross_attention_layers
        return prefix_of_each_layer(bridge.kv_prefix, pooled, layers, bridge.kv_gate)

    @staticmethod
    def _image_features(bridge: Any, seen: QFormerOutput) -> Tensor:
        """(b, q, e), of unit length."""
        return F.normalize(bridge.vision_proj(seen.last_hidden_state), dim=-1)

    @staticmethod
    def _text_features(bridge: Any, texts: Texts) -> Tensor:
        """(b, e), of unit length: what [CLS] has become."""
        read = bridge.Qformer(input_ids=texts.token_ids, attention_mask=texts.mask)
        return F.normalize(bridge.text_proj(read.last_hidden_state[:, 0]), dim=-1)

    def _read_and_see(self, bridge: Any, features: FrozenFeatures, texts: Texts) -> Tensor:
        """Queries and texts together, each seeing the other: hidden states (b, q + t, hidden)."""
        b, q = len(texts.token_ids), self.query_tokens.shape[1]
        seen = self._see(
            bridge,
            features,
            input_ids=texts.token_ids,
            attention_mask=torch.cat([texts.mask.new_ones(b, q), texts.mask], dim=1),
        )
        return seen.last_hidden_state

    def _pair_or_not(self, features: FrozenFeatures, texts: Texts) -> Tensor:
        """The matching head's logits (b, 2): the mean over the queries, which have seen image and text."""
        return self.itm_head(self._read_and_see(self, features, texts)[:, : self.query_tokens.shape[1]]).mean(dim=1)

    # ------------------------------------------------------------ losses

    def forward(self, samples: Dict[str, Any]) -> Stage1Output:
        """The objectives' losses of a batch of images with a text each.

        Args:
            samples: ``image`` (b, 3, H, H), ``text_input`` (b texts); ``image_id`` or ``image_key`` tells which images
                are the same, else all count as different.

        Returns:
            ``loss``, the weighted sum; ``loss_itc``, ``loss_itm``, ``loss_lm`` and ``loss_mlm``, None where off. Each
            is this rank's share of the mean over all ranks, so that its mean over ranks is the loss of the whole batch.
        """
        features = self.features(samples)
        texts = self.tokenise(samples["text_input"], padding="max_length")
        if self.momentum is not None and self.training:
            self.momentum.follow(self._followed())
        seen = self._see(self, features, use_cache=self.objectives["itg"] > 0)
        losses: Dict[str, Loss] = {}
        if self.objectives["itc"] or self.objectives["itm"]:
            losses.update(self._compare(samples, features, texts, seen))
        if self.objectives["itg"]:
            losses["itg"] = self._caption(texts, seen)
        if self.objectives["mlm"]:
            losses["mlm"] = self._fill_in(samples, features, texts)
        return self._output({name: loss for name, loss in losses.items() if self.objectives[name]})

    def _output(self, losses: Dict[str, Loss]) -> Stage1Output:
        counts = all_reduce_tensor(torch.stack([loss.terms.float() for loss in losses.values()]))
        shares = [loss.total * get_world_size() / count.clamp(min=1) for loss, count in zip(losses.values(), counts)]
        means = dict(zip(losses, shares))
        total = sum(self.objectives[name] * mean for name, mean in means.items())
        return Stage1Output(
            loss=total,
            loss_itc=means.get("itc"),
            loss_itm=means.get("itm"),
            loss_lm=means.get("itg"),
            loss_mlm=means.get("mlm"),
        )

    def _compare(
        self, samples: Mapping[str, Any], features: FrozenFeatures, texts: Texts, seen: QFormerOutput
    ) -> Dict[str, Loss]:
        """Contrastive loss, and matching with negatives that the contrastive scores choose."""
        image, text = self._image_features(self, seen), self._text_features(self, texts)
        mine = _identity(samples, self.device)
        everyone = Identity(*map(gather_rows, mine))
        positives = self._positives(mine, everyone)
        similar = similarities(image, text, gather_rows(image), gather_rows(text))
        if self.momentum is None or self.queue is None:
            contrast = contrastive_loss(similar, self.temp, positives)
        else:
            bridge, queue = self.momentum, self.queue
            pairs = PairsOfBatch(image, text, positives, mine, everyone)
            contrast = self._contrast_with_momentum(bridge, queue, samples, features, texts, pairs)
        if not self.objectives["itm"]:
            return {"itc": contrast}
        return {"itc": contrast, "itm": self._match(features, texts, similar, positives)}

    def _positives(self, mine: Identity, others: Identity) -> Tensor:
        """(b, B) booleans: which of the others' samples are true of mine; my own stand from my rank's place on."""
        if not self.own_pairs_only:
            return belonging(mine, others)
        b = len(mine.image)
        sizes = gather_rows(torch.tensor([b], device=self.device))
        first = int(sizes[: get_rank()].sum())
        own = torch.zeros(b, len(others.image), dtype=torch.bool, device=self.device)
        own[:, first : first + b].fill_diagonal_(True)
        return own

    def _match(self, features: FrozenFeatures, texts: Texts, similar: Similarities, positives: Tensor) -> Loss:
        """For each text a wrong image, for each image a wrong text, drawn from all ranks by how well they fit."""
        wrong_images = draw_hard_negatives(similar.text_to_image / self.temp, positives)
        wrong_texts = draw_hard_negatives(similar.image_to_text / self.temp, positives)
        all_images = _each(gather_rows, features)
        all_texts = Texts(*map(gather_rows, texts))
        images = _stacked(features, _each(lambda part: part[wrong_images.chosen], all_images), features)
        paired = Texts(*(torch.cat([t, t, of_all[wrong_texts.chosen]]) for t, of_all in zip(texts, all_texts)))
        return matching_loss(self._pair_or_not(images, paired), torch.cat([wrong_images.exists, wrong_texts.exists]))

    def _caption(self, texts: Texts, seen: QFormerOutput) -> Loss:
        """Each word from those before it and the queries, whose Keys and Values stand in front."""
        token_ids = texts.token_ids.clone()
        token_ids[:, 0] = self.tokenizer.bos_token_id
        b, q = len(token_ids), self.query_tokens.shape[1]
        read = self.Qformer(
            input_ids=token_ids,
            attention_mask=torch.cat([texts.mask.new_ones(b, q), texts.mask], dim=1),
            past_key_values=seen.past_key_values,
            is_decoder=True,
        )
        return captioning_loss(self.Qformer.cls(read.last_hidden_state), token_ids, self.tokenizer.pad_token_id)

    def _fill_in(self, samples: Mapping[str, Any], features: FrozenFeatures, texts: Texts) -> Loss:
        """Hidden words from all others and from the image, seen through the queries (ALBEF's MLM); a momentum model's
        words are among the targets."""
        tokenizer = self.tokenizer
        special = texts.mask == 0
        for token in (tokenizer.cls_token_id, tokenizer.sep_token_id):
            special = special | (texts.token_ids == token)
        masked = mask_words(texts.token_ids, special, mask_token_id=tokenizer.mask_token_id, vocab_size=len(tokenizer))
        shown = Texts(masked.token_ids, texts.mask)
        words = self._words(self, features, shown)
        if self.momentum is None:
            return masked_words_loss(words, masked.labels)
        with torch.no_grad():
            opinion = self._words(self.momentum, features, shown).softmax(dim=-1)
        return masked_words_loss(words, masked.labels, opinion, self.momentum_alpha * _ramp(samples))

    def _words(self, bridge: Any, features: FrozenFeatures, texts: Texts) -> Tensor:
        """Logits (b, t, v) of the word at each place of the texts."""
        hidden = self._read_and_see(bridge, features, texts)[:, self.query_tokens.shape[1] :]
        return bridge.Qformer.cls(hidden)

    def _contrast_with_momentum(
        self,
        bridge: MomentumWeights,
        queue: FeatureQueue,
        samples: Mapping[str, Any],
        features: FrozenFeatures,
        texts: Texts,
        pairs: PairsOfBatch,
    ) -> Loss:
        """ITC against the momentum model's features of this batch and of the queue, its opinion among the targets."""
        with torch.no_grad():
            image_m = self._image_features(bridge, self._see(bridge, features))
            text_m = self._text_features(bridge, texts)
            queued = queue.contents()
            new_images, new_texts = gather_rows(image_m), gather_rows(text_m)
            all_images, all_texts = torch.cat([new_images, queued.image]), torch.cat([new_texts, queued.text])
            positives = torch.cat([pairs.positives, belonging(pairs.mine, queued.identity)], dim=1)
            opinion = Similarities(
                *(
                    (scores / self.temp).softmax(dim=1)
                    for scores in similarities(image_m, text_m, all_images, all_texts)
                )
            )
            if self.training:
                queue.push(new_images, new_texts, pairs.everyone)
        alpha = self.momentum_alpha * _ramp(samples)
        similar = similarities(pairs.image, pairs.text, all_images, all_texts)
        return contrastive_loss(similar, self.temp, positives, opinion, alpha)

    # ------------------------------------------------------------ features and scores

    @torch.no_grad()
    def extract_features(self, samples: Dict[str, Any], mode: str = "multimodal") -> BlipOutputFeatures:
        """Features of images, texts, or of both together, as LAVIS's ``blip2_feature_extractor`` gives them.

        Args:
            samples: ``image`` (b, 3, H, H) and ``text_input`` (b texts), as far as the mode needs them.
            mode: ``image``: ``image_embeds`` (b, q, hidden) and ``image_embeds_proj`` (b, q, e). ``text``:
                ``text_embeds`` (b, t, hidden) and ``text_embeds_proj`` (b, t, e). ``multimodal``:
                ``multimodal_embeds`` (b, q, hidden).

        Raises:
            ValueError: for another mode, or without what the mode needs.
        """
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}; got {mode!r}")
        for key in {"image": ("image",), "text": ("text_input",)}.get(mode, ("image", "text_input")):
            if samples.get(key) is None:
                raise ValueError(f"mode {mode!r} needs samples[{key!r}]")
        if mode == "image":
            seen = self.encode(samples).query_output
            return BlipOutputFeatures(
                image_embeds=seen.last_hidden_state, image_embeds_proj=self._image_features(self, seen)
            )
        texts = self.tokenise(samples["text_input"], whole=True)
        if mode == "text":
            read = self.Qformer(input_ids=texts.token_ids, attention_mask=texts.mask).last_hidden_state
            return BlipOutputFeatures(text_embeds=read, text_embeds_proj=F.normalize(self.text_proj(read), dim=-1))
        hidden = self._read_and_see(self, self.features(samples), texts)
        return BlipOutputFeatures(multimodal_embeds=hidden[:, : self.query_tokens.shape[1]])

    @torch.no_grad()
    def match(self, features: FrozenFeatures, texts: Texts) -> Tensor:
        """How well b images and b texts fit by the matching head: logits (b, 2), column 1 for a pair."""
        return self._pair_or_not(features, texts)

    @torch.no_grad()
    def image_features(self, features: FrozenFeatures) -> Tensor:
        """Frozen features of b images -> (b, q, e), of unit length, to be compared with `text_features`."""
        return self._image_features(self, self._see(self, features))

    @torch.no_grad()
    def text_features(self, texts: Texts) -> Tensor:
        """b texts -> (b, e), of unit length."""
        return self._text_features(self, texts)

    def compute_sim_matrix(self, data_loader: Any, task_cfg: Any) -> Tuple[np.ndarray, np.ndarray]:
        """What LAVIS's task ``retrieval`` asks for: see `lavis_kvmod.models.sim_matrix`."""
        return compute_sim_matrix(self, data_loader, task_cfg.k_test)


class Blip2KVModITM(Blip2KVMod):
    """``blip2_kvmod_image_text_matching``: the same model, called for its scores
    (``lavis/models/blip2_models/blip2_image_text_matching.py``)."""

    # LAVIS's class has another `forward` than its base, too.
    def forward(self, samples: Dict[str, Any], match_head: str = "itm") -> Tensor:  # type: ignore[override]
        """``itm``: logits (b, 2), column 1 for a pair. ``itc``: the cosine of the query that fits best (b, 1).

        Raises:
            ValueError: for another head.
        """
        features, texts = self.features(samples), self.tokenise(samples["text_input"])
        if match_head == "itm":
            return self._pair_or_not(features, texts)
        if match_head == "itc":
            image = self._image_features(self, self._see(self, features))
            return torch.einsum("bqe,be->bq", image, self._text_features(self, texts)).amax(dim=1, keepdim=True)
        raise ValueError(f"match_head: expected 'itm' or 'itc', got {match_head!r}")


def _identity(samples: Mapping[str, Any], device: torch.device) -> Identity:
    """Numbers for the batch's images and texts; images that nothing tells apart count as different."""
    texts = samples["text_input"]
    ids = next((samples[key] for key in ("image_id", "image_key") if samples.get(key) is not None), None)
    if ids is None:
        ids = [f"{get_rank()}/{i}" for i in range(len(texts))]
    images = ids.tolist() if isinstance(ids, Tensor) else ids
    return Identity(*(torch.tensor([_number(item) for item in items], device=device) for items in (images, texts)))


def _number(item: Any) -> int:
    """Equal things, equal numbers of 63 bits, on every rank."""
    return int.from_bytes(hashlib.blake2b(str(item).encode(), digest_size=8).digest(), "big") >> 1


def _ramp(samples: Mapping[str, Any]) -> float:
    """From 0 to 1 over the first epoch: a momentum model knows nothing yet (ALBEF)."""
    if samples.get("epoch", 1) > 0:
        return 1.0
    return min(1.0, samples.get("iters", 0) / max(samples.get("num_iters_per_epoch", 1), 1))


def _each(change: Callable[[Tensor], Tensor], features: FrozenFeatures) -> FrozenFeatures:
    """The same done to the visual tokens, and to the pooled features where there are any."""
    return FrozenFeatures(change(features.visual_tokens), None if features.pooled is None else change(features.pooled))


def _stacked(*features: FrozenFeatures) -> FrozenFeatures:
    """One batch behind the other."""
    pooled = [part.pooled for part in features if part.pooled is not None]
    return FrozenFeatures(torch.cat([part.visual_tokens for part in features]), torch.cat(pooled) if pooled else None)
