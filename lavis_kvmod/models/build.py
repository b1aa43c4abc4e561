"""From settings to parts: what LAVIS's YAML says, made into the modules that a model is put together from."""

import logging
from typing import Any, Dict, NamedTuple, Optional, Tuple

from lavis_kvmod.models.connectors import CONNECTORS, ConnectorSizes
from lavis_kvmod.models.connectors.aux_tokens import AuxTokens, Place
from lavis_kvmod.models.connectors.kv_prefix import PrefixGenerator, prefix_generator
from lavis_kvmod.models.connectors.registry import Connector
from lavis_kvmod.models.language.bert import BLIP2_VOCABULARY, load_bert_tokenizer, start_from_bert
from lavis_kvmod.models.language.gated_cross_attention import GatedLayers
from lavis_kvmod.models.language.opt import FrozenOPT, build_language_model
from lavis_kvmod.models.settings import (
    ImageSideSettings,
    ModelSettings,
    MomentumSettings,
    ObjectiveSettings,
    Stage1Settings,
)
from lavis_kvmod.models.several_images import ImagePlaces
from lavis_kvmod.models.vision.auxiliary import (
    Auxiliary,
    build_auxiliary_encoder,
    side_by_side,
    untrained_encoder,
)
from lavis_kvmod.models.vision.encoders import Vision, build_vision_encoder


class ImageSide(NamedTuple):
    """All that an image passes on its way to the query outputs; every model of the family has it."""

    vision: Vision
    aux_encoder: Optional[Auxiliary]
    kv_prefix: Optional[PrefixGenerator]
    connector: Connector
    aux_tokens: Optional[AuxTokens] = None

    def arguments(self, settings: ImageSideSettings) -> Dict[str, Any]:
        """The arguments of a model's constructor that have to do with images."""
        return dict(
            visual_encoder=self.vision.visual_encoder,
            ln_vision=self.vision.ln_vision,
            qformer=self.connector,
            num_query_token=settings.num_query_token,
            kv_prefix=self.kv_prefix,
            aux_encoder=self.aux_encoder,
            prefix_gate=settings.prefix_gate,
            freeze_vit=settings.freeze_vit,
            image_size=settings.image_size,
            cache_frozen_features=settings.cache_frozen_features,
            feature_cache_gib=settings.feature_cache_gib,
            feature_cache_dir=settings.feature_cache_dir,
            prefix_control=settings.prefix_control,
        )


def build_image_side(
    settings: ImageSideSettings,
    *,
    load: bool = True,
    connector: str = "qformer",
    num_aux_tokens: int = 0,
    merged_tokens: Optional[int] = None,
    aux_place: Place = "tokens",
    soft_prompt: bool = True,
    **more_sizes: Any,
) -> ImageSide:
    """Image encoder, auxiliary encoder, prefix generator and connector, as the settings have them.

    Args:
        load: frozen towers with their weights; without, no file is looked for.
        connector: the name of a registered connector.
        num_aux_tokens: so many tokens of the auxiliary encoder's features, in place of a prefix; 0 writes a prefix.
        aux_place: what those tokens join.
        merged_tokens: how many visual tokens the connector is given, where it is not all of them.
        soft_prompt: the connector's outputs become vectors of the language model's width, else they stay as they are.
        more_sizes: those of `ConnectorSizes` that have nothing to do with images.

    Raises:
        MissingWeightsError, CheckpointError: if the weights cannot be had, or do not fit.
        ValueError: if the connector cannot take what the image encoder gives.
    """
    vision = _build_vision(settings, load)
    tokens = merged_tokens or vision.num_tokens
    sizes = ConnectorSizes(vision.width, settings.num_query_token, num_visual_tokens=tokens, **more_sizes)
    made = CONNECTORS[connector].build(settings, sizes)
    if not settings.kv_modulation:
        return ImageSide(vision, None, None, made)
    aux_encoder = _build_auxiliary(settings, load)
    if num_aux_tokens:
        width = made.hidden_size
        if aux_place == "visual_tokens":
            width = vision.width
        elif aux_place == "tokens" and soft_prompt and sizes.output_width:
            width = sizes.output_width
        aux_tokens = AuxTokens(
            feature_dim=aux_encoder.feature_dim, output_width=width, num_tokens=num_aux_tokens, place=aux_place
        )
        return ImageSide(vision, aux_encoder, None, made, aux_tokens)
    layers = made.num_cross_attention_layers
    kv_prefix = None
    if layers:  # else it is for the gated layers alone
        kv_prefix = _build_prefix(
            settings, aux_encoder, layers, hidden_size=made.hidden_size, num_heads=made.num_attention_heads
        )
    return ImageSide(vision, aux_encoder, kv_prefix, made)


def _build_auxiliary(settings: ImageSideSettings, load: bool) -> Auxiliary:
    size, grid = settings.aux_image_size, settings.grid_side()
    if load and not settings.reads_aux_weights:
        return side_by_side([untrained_encoder(name, size, grid) for name, _ in settings.aux_encoders])
    return side_by_side(
        [build_auxiliary_encoder(name, file, size, load=load, grid=grid) for name, file in settings.aux_encoders]
    )


def _build_prefix(settings: ImageSideSettings, aux_encoder: Auxiliary, layers: int, **sizes: Any) -> PrefixGenerator:
    """What writes the prefix for so many cross-attention layers of these sizes."""
    side = settings.grid_side()
    return prefix_generator(
        [encoder.feature_dim for encoder in aux_encoder.members],
        num_prefix_tokens=settings.num_prefix_tokens if side is None else side * side,
        num_layers=layers if settings.prefix_sharing == "per_layer" else None,
        grid=side is not None,
        **sizes,
    )


def _build_vision(settings: ImageSideSettings, load: bool) -> Vision:
    precision = settings.vit_precision
    if not settings.freeze_vit and precision != "fp32":
        logging.info(
            "the ViT is trained (freeze_vit: false), so its weights are fp32, not %s: half precision loses small "
            "updates, and fp16 gradients cannot be unscaled",
            precision,
        )
        precision = "fp32"
    return build_vision_encoder(
        settings.vit_model,
        checkpoint=settings.vit_checkpoint,
        image_size=settings.image_size,
        drop_path_rate=settings.drop_path_rate,
        use_grad_checkpoint=settings.use_grad_checkpoint,
        precision=precision,
        geometry=settings.vit_geometry,
        load=load,
    )


def opt_arguments(settings: ModelSettings, *, load: bool = True) -> Dict[str, Any]:
    """The arguments of `Blip2OPTKVMod`: the image side, OPT behind it, and what they are to do.

    Raises:
        MissingWeightsError, CheckpointError, ValueError: as `build_image_side`.
    """
    opt_model, opt_tokenizer = build_language_model(
        settings.opt_model,
        precision=settings.opt_precision,
        use_grad_checkpoint=settings.opt_grad_checkpoint,
        load=load,
    )
    qformer_tokenizer, vocabulary = _bert(settings.bert_model, load) if settings.qformer_text_input else (None, None)
    image_side = build_image_side(
        settings,
        load=load,
        vocab_size=vocabulary,
        connector=settings.connector,
        geometry=settings.connector_geometry,
        output_width=opt_model.config.word_embed_proj_dim,
        num_aux_tokens=settings.aux_tokens,
        merged_tokens=settings.merge_visual_tokens,
        aux_place=settings.aux_place,
        soft_prompt=settings.fusion == "soft_prompt",
    )
    return dict(
        opt_model=opt_model,
        opt_tokenizer=opt_tokenizer,
        qformer_tokenizer=qformer_tokenizer,
        aux_tokens=image_side.aux_tokens,
        prefix_dropout=settings.prefix_dropout,
        gated_layers=_gated_layers(settings, opt_model, image_side),
        image_places=_image_places(settings, image_side),
        pool_visual_tokens=settings.pool_visual_tokens,
        merge_visual_tokens=settings.merge_visual_tokens,
        prompt=settings.prompt,
        max_txt_len=settings.max_txt_len,
        answer_loss=settings.answer_loss,
        split_texts=settings.split_texts,
        ln_vision_loaded=image_side.vision.ln_vision_loaded,
        **image_side.arguments(settings),
    )


def _image_places(settings: ModelSettings, image_side: ImageSide) -> Optional[ImagePlaces]:
    if settings.num_places == 1:
        return None
    prefix_width = None if image_side.kv_prefix is None else image_side.connector.hidden_size
    told = "max_images" if settings.tiles is None else "tiles"
    return ImagePlaces(settings.num_places, image_side.vision.width, prefix_width, told)


def _gated_layers(settings: ModelSettings, opt: FrozenOPT, image_side: ImageSide) -> Optional[GatedLayers]:
    every = settings.gated_every
    if settings.fusion == "soft_prompt":
        return None
    config, image_width, aux_encoder = opt.config, image_side.connector.hidden_size, image_side.aux_encoder
    gated = GatedLayers(
        width=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        image_width=image_width,
        every=every,
    )
    if aux_encoder is not None and image_side.aux_tokens is None:
        sizes = dict(attention_width=config.hidden_size, num_heads=config.num_attention_heads)
        generator = _build_prefix(settings, aux_encoder, len(gated.places), hidden_size=image_width, **sizes)
        gated.add_prefix(generator, settings.prefix_gate)
    return gated


def _bert(name: str, load: bool) -> Tuple[Any, int]:
    """The tokenizer of a text side, None if there is nothing to be loaded; and the size of its vocabulary."""
    tokenizer = load_bert_tokenizer(name) if load else None
    return tokenizer, BLIP2_VOCABULARY if tokenizer is None else len(tokenizer)


def stage_1_arguments(settings: Stage1Settings, *, load: bool = True) -> Dict[str, Any]:
    """The arguments of `Blip2KVMod`: the image side, a Q-Former that also reads texts, and its objectives.

    Raises:
        MissingWeightsError, CheckpointError: as `build_image_side`; also for BERT's files.
    """
    tokenizer, vocabulary = _bert(settings.bert_model, load)
    image_side = build_image_side(settings, load=load, vocab_size=vocabulary, word_head=True)
    if load and settings.from_bert and settings.checkpoint() is None:
        start_from_bert(image_side.connector, settings.bert_model)
    momentum = None if settings.momentum is None else MomentumSettings.of(settings.momentum)
    return dict(
        tokenizer=tokenizer,
        embed_dim=settings.embed_dim,
        max_txt_len=settings.max_txt_len,
        objectives=ObjectiveSettings.of(settings.objectives).model_dump(),
        own_pairs_only=settings.own_pairs_only,
        momentum_queue=0 if momentum is None else momentum.queue,
        **({} if momentum is None else {"momentum_rate": momentum.rate, "momentum_alpha": momentum.alpha}),
        ln_vision_loaded=image_side.vision.ln_vision_loaded,
        **image_side.arguments(settings),
    )
