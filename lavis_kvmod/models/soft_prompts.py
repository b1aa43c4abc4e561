"""A member with a language model: the image's way into it, questions in front of it, texts out of it."""

from contextlib import nullcontext
from typing import Any, ContextManager, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from lavis_kvmod.models.base import KVModBase
from lavis_kvmod.models.connectors.aux_tokens import AuxTokens, joined
from lavis_kvmod.models.connectors.qformer import QFormerOutput
from lavis_kvmod.models.language.answers import mean_loss
from lavis_kvmod.models.language.conversation import LaidOut, conversation_ids, in_conversation
from lavis_kvmod.models.language.decoding import Search
from lavis_kvmod.models.language.gated_cross_attention import GatedLayers
from lavis_kvmod.models.language.opt import FrozenOPT
from lavis_kvmod.models.language.packing import Packing, pack, packing_pays
from lavis_kvmod.models.language.soft_prompt import ScoredAnswer, continue_texts, token_losses
from lavis_kvmod.models.language.text import (
    QUESTION,
    Prompt,
    TextBatch,
    caption_batch,
    caption_contexts,
    labelled_batch,
    one_each,
    question_contexts,
)
from lavis_kvmod.models.several_images import Seen, each_by_itself, in_order, in_windows
from lavis_kvmod.system.turns import Turn

__all__ = ["Encoded", "SoftPromptModel", "together"]


class Encoded(NamedTuple):
    """A batch of images on its way: the Q-Former's output, and the soft prompt (b, q, opt width); with gated layers, in
    its place, what those attend to (b, p + q, hidden), prefix and all."""

    query_output: QFormerOutput
    soft_prompt: Tensor


def together(rows: Sequence[List[int]], groups: Sequence[Encoded]) -> Encoded:
    """What was made of groups of a batch's samples, ``rows``, in the batch's order; without attention maps, which
    differ in width."""
    hidden = in_order([each.query_output.last_hidden_state for each in groups], rows)
    return Encoded(QFormerOutput(hidden), in_order([each.soft_prompt for each in groups], rows))


class SoftPromptModel(KVModBase):
    """A member whose query outputs become the soft prompt of a language model. A batch may show an image once for
    several samples, and may bring soft prompts that have been computed before."""

    opt_model: FrozenOPT
    opt_tokenizer: Any
    eos_token_id: int
    prompt: str
    split_texts: bool
    max_txt_len: int
    qformer_tokenizer: Any
    opt_proj: Optional[nn.Linear]
    aux_tokens: Optional[AuxTokens]
    gated_layers: Optional[GatedLayers]

    def num_samples(self, samples: Mapping[str, Any]) -> int:
        """How many samples a batch has: texts, where ``image_index`` tells which image each belongs to, else images."""
        return len(samples["image_index"] if "image_index" in samples else samples["image"])

    def soft_prompts(self, samples: Dict[str, Any], asked: bool = False) -> Tensor:
        """The soft prompt of each sample, (b, q, width). An image is encoded once, however many samples show it
        (``image_index`` (b,)), and not at all if `encoded` has been given the batch. In conversations, of each image.

        ``asked`` says that ``text_input`` is questions, as it is where there are answers; else it is captions.
        """
        soft_prompt = self._of_images(samples, asked)
        if "image_index" not in samples or self.reads_questions or in_conversation(samples):
            return soft_prompt
        return soft_prompt[samples["image_index"]]

    def _of_images(self, samples: Dict[str, Any], asked: bool = False) -> Tensor:
        """The soft prompt of each image (i, q, width); of each sample, where the Q-Former reads its question."""
        if "soft_prompt" in samples:
            return samples["soft_prompt"]
        if in_conversation(samples) and "window" not in samples:
            self._require_places()
            count = self.num_samples(samples)
            samples, shown = each_by_itself(samples)
            if not any(shown):  # of the blank one nothing stands in front of a text
                return self.encode(samples).soft_prompt.expand(count, -1, -1)[:, :0]
        if not (asked or "answer" in samples):  # a caption is not to be shown
            samples = {key: value for key, value in samples.items() if key != "text_input"}
        if "window" in samples:
            return self._of_windows(samples)
        return self.encode(samples).soft_prompt

    def _of_windows(self, samples: Dict[str, Any]) -> Tensor:
        """The soft prompts of all windows of a long sequence behind each other (b, w * q, width)."""
        windows, has = in_windows(samples), self.opt_model.config.max_position_embeddings
        if self.gated_layers is not None or in_conversation(samples):
            raise ValueError("window: gated layers and conversations have no windows; leave it out")
        number = len(windows) * self.num_soft_prompt
        if number >= has:
            raise ValueError(
                f"{len(windows)} windows of {self.num_soft_prompt} soft-prompt vectors are {number}, and the language "
                f"model has {has} positions: take fewer images, or a larger window or stride"
            )
        return torch.cat([self.encode(own).soft_prompt for own in windows], dim=1)

    def _require_places(self) -> None:
        if self.gated_layers is not None or self.reads_questions:
            what = "fusion: gated_cross_attention" if self.gated_layers is not None else "qformer_text_input"
            raise ValueError(f"model.{what}: a conversation's images have no place in its text; leave it out")

    def encoded(self, samples: Dict[str, Any]) -> Dict[str, Any]:
        """The batch with the soft prompts of its images, for several passes (answers and a loss) over the same ones."""
        return {**samples, "soft_prompt": self._of_images(samples)}

    # ------------------------------------------------------------ a question beside the queries

    @property
    def reads_questions(self) -> bool:
        """Whether the Q-Former reads a sample's question beside its queries (InstructBLIP, arXiv 2305.06500)."""
        return getattr(self.Qformer, "vocab_size", None) is not None

    def _with_text(self, features: Seen, samples: Mapping[str, Any]) -> Tuple[Seen, Dict[str, Any]]:
        """Features of images as those of samples, and what the Q-Former is given beside them: the question, of a
        caption what it begins with. Nothing is changed where it reads no text."""
        if not self.reads_questions:
            return features, {}
        if "image_index" in samples:
            rows = samples["image_index"].to(features.visual_tokens.device)
            pooled = None if features.pooled is None else features.pooled[rows]
            features = Seen(features.visual_tokens[rows], pooled)
        ids, mask = self._tokenised(samples, len(features.visual_tokens))
        mask = torch.cat([mask.new_ones(len(mask), self.num_outputs), mask], dim=1)
        return features, {"input_ids": ids, "attention_mask": mask, "queries_only": True}

    def _tokenised(self, samples: Mapping[str, Any], count: int) -> Tuple[Tensor, Tensor]:
        """Token ids and mask (b, t), ``[CLS] … [SEP]``, padded on the right."""
        if self.qformer_tokenizer is None:  # in a model that is there to be counted
            ids = torch.zeros(count, self.max_txt_len, dtype=torch.long, device=self.device)
            return ids, torch.ones_like(ids)
        texts = samples.get("text_input", samples.get("prompt", self.prompt))
        texts = [texts] * count if isinstance(texts, str) else list(texts)
        if len(texts) != count:
            raise ValueError(f"{count} images but {len(texts)} questions")
        tokens = self.qformer_tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_txt_len, return_tensors="pt"
        ).to(self.device)
        return tokens.input_ids, tokens.attention_mask

    # ------------------------------------------------------------ the language model

    @property
    def num_soft_prompt(self) -> int:
        """How many vectors stand before the text."""
        if self.gated_layers is not None:
            return 0
        return self.num_outputs + (0 if self.aux_tokens is None else self.aux_tokens.in_front_of("tokens"))

    def _for_language_model(self, of_image: Tensor, pooled: Optional[Tensor], dropped: Optional[Tensor]) -> Tensor:
        """The connector's output (b, q, hidden) as what `Encoded.soft_prompt` is, with what the second encoder adds."""
        if self.opt_proj is not None:
            of_image = self.opt_proj(of_image)
        if self.gated_layers is not None:
            of_image = self.gated_layers.beside_prefix(of_image, pooled, dropped)
        return joined("tokens", of_image, self.aux_tokens, pooled)

    def into_language_model(self, of_image: Tensor) -> Tuple[Tensor, ContextManager[None]]:
        """What `encode` has for an image, as soft prompt (b, q, opt width), and a context in which OPT sees what is not
        in it: with gated layers q is 0."""
        if self.gated_layers is None:
            return of_image, nullcontext()
        nothing = of_image.new_zeros(len(of_image), 0, self.opt_model.config.word_embed_proj_dim)
        return nothing, self.gated_layers.within(self.opt_model, of_image)

    def _run_inside(self, part: nn.Module) -> List[nn.Module]:
        """Gated layers, which are trained in float32, stand between the language model's own."""
        inside = super()._run_inside(part)
        return [*inside, self.gated_layers] if part is self.opt_model and self.gated_layers is not None else inside

    def _language_loss(
        self, soft_prompt: Tensor, text: TextBatch, row_weights: Optional[Tensor], image_of: Optional[Tensor] = None
    ) -> Dict[str, Tensor]:
        """Mean loss of texts (b, t), each behind its own soft prompt, or behind that of its image ``image_of`` (b,)."""
        row, token_loss = self.token_losses(soft_prompt, text, image_of)
        return mean_loss(token_loss, None if row_weights is None else row_weights.to(row.device)[row])

    def token_losses(
        self, soft_prompt: Tensor, text: TextBatch, image_of: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor]:
        """The row of each labelled token of texts (b, t), and its loss, each (k,). ``soft_prompt`` is that of each
        text, or of images, and ``image_of`` (b,) says which is a text's."""
        if text.has_images:  # it names them itself
            image_of = None
        shares = image_of if soft_prompt.shape[1] else None  # a text alone shares nothing
        packing = None if shares is None else self._packing(soft_prompt, text, shares.tolist())
        if image_of is not None and packing is None:
            soft_prompt = soft_prompt[image_of.to(soft_prompt.device, non_blocking=True)]
        soft_prompt, seeing = self.into_language_model(soft_prompt)
        with self.autocast_for(self.opt_model), seeing:
            return token_losses(self.opt_model, soft_prompt, text, packing)

    def _packing(self, soft_prompt: Tensor, text: TextBatch, image_of: List[int]) -> Optional[Packing]:
        """How the texts of an image share its row of the language model; None where that saves little."""
        images, q = soft_prompt.shape[:2]
        width = self.opt_model.config.hidden_size
        if self.gated_layers is not None or not packing_pays(image_of, text.lengths, q, width):
            return None
        columns, device = text.input_ids.shape[1], soft_prompt.device
        return pack(image_of, text.lengths, num_images=images, num_soft=q, columns=columns, device=device)

    def _question_contexts(self, samples: Dict[str, Any], prompt: Prompt = "") -> List[List[int]]:
        """Token ids of each question in its prompt: the same in training and in evaluation."""
        count, questions = self.num_samples(samples), samples["text_input"]
        questions = [questions] * count if isinstance(questions, str) else questions
        if len(questions) != count:
            raise ValueError(f"{count} images but {len(questions)} questions")
        prompt = prompt or samples.get("prompt") or (self.prompt if QUESTION in self.prompt else "")
        if in_conversation(samples):
            turns = [[*before, (question, None)] for before, question in zip(samples["history"], questions)]
            return [laid_out.ids for laid_out in self._laid_out(samples, turns, prompt)]
        return question_contexts(self.opt_tokenizer, questions, prompt, self.max_txt_len)

    def _laid_out(
        self, samples: Mapping[str, Any], turns: Sequence[Sequence[Turn]], prompt: Prompt, then: Sequence[str] = ()
    ) -> List[LaidOut]:
        """The batch's conversations, with their images at their places."""
        q, images = self.num_soft_prompt, each_by_itself(samples)[1]
        found = []
        for i, (own, template) in enumerate(zip(turns, one_each(prompt, len(turns)))):
            soft = [range(-1 - number * q, -1 - (number + 1) * q, -1) for number in images[i]]
            ends = then[i] if then else None
            found.append(conversation_ids(self.opt_tokenizer, own, template, self.max_txt_len, soft, ends))
        return found

    def _told(self, samples: Dict[str, Any]) -> TextBatch:
        """What is learnt without questions of its own: captions, or whole conversations with all their answers."""
        prompt = samples.get("prompt", self.prompt)
        if "turns" in samples:
            laid_out = self._laid_out(samples, samples["turns"], prompt)
            ids, labels = [own.ids for own in laid_out], [own.labels for own in laid_out]
            return labelled_batch(self.opt_tokenizer, ids, labels, self.device)
        return caption_batch(
            *(self.opt_tokenizer, samples["text_input"], prompt, self.max_txt_len, self.device),
            split=self.split_texts and self.training,
        )

    def _begun(self, samples: Dict[str, Any]) -> List[List[int]]:
        """Token ids of what `generate` continues: prompts, behind a conversation's turns where there are any."""
        prompt, count = samples.get("prompt", self.prompt), self.num_samples(samples)
        if not in_conversation(samples):
            return caption_contexts(self.opt_tokenizer, prompt, count)
        frame = self.prompt if QUESTION in self.prompt else ""
        then = one_each("" if QUESTION in prompt else prompt, count)
        return [laid_out.ids for laid_out in self._laid_out(samples, samples["history"], frame, then)]

    def _continue(
        self, soft_prompt: Tensor, contexts: List[List[int]], search: Search, return_scores: bool
    ) -> Union[List[str], List[ScoredAnswer]]:
        """Let OPT continue each context behind its soft prompt up to the newline; returns what it adds."""
        tokenizer = self.opt_tokenizer
        soft_prompt, seeing = self.into_language_model(soft_prompt)
        with seeing:
            added = continue_texts(self.opt_model, tokenizer, soft_prompt, contexts, search, stop=self.eos_token_id)
        texts = [text.strip() for text in tokenizer.batch_decode([a.ids for a in added], skip_special_tokens=True)]
        if not return_scores:
            return texts
        return [ScoredAnswer(text, a.log_prob, len(a.ids)) for text, a in zip(texts, added)]
