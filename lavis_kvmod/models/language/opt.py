"""The frozen language model: LAVIS's OPT, from a Hugging Face name or folder, or the demo's own."""

from pathlib import Path
from typing import Optional

from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM
from transformers import AutoTokenizer

from lavis_kvmod.models.empty import empty_weights
from lavis_kvmod.models.grad_checkpoint import recompute_in_backward
from lavis_kvmod.system.precision import DTYPES
from lavis_kvmod.weights.finding import MissingWeightsError, WeightFile
from lavis_kvmod.weights.reading import load_weights, read_folder


class FrozenOPT(OPTForCausalLM):
    """LAVIS's OPT, frozen, and generating with its Key/Value cache.

    LAVIS's ``prepare_inputs_for_generation`` takes ``past``; transformers 4.26 passes ``past_key_values``, so stock
    LAVIS recomputes the whole sequence at every decoding step.
    """

    def __init__(self, config):
        super().__init__(config)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenOPT":
        """Stay in eval mode whatever ``mode`` says: no dropout in a frozen language model."""
        return super().train(False)

    def prepare_inputs_for_generation(self, input_ids=None, query_embeds=None, past_key_values=None, **kwargs):
        """See the class; arguments as transformers 4.26 gives them."""
        kwargs.setdefault("past", past_key_values)
        return super().prepare_inputs_for_generation(input_ids, query_embeds, **kwargs)


def _demo_language_model() -> Path:
    from lavis_kvmod.demo import parts

    return parts.language_model()


def language_model_weights(name: str) -> WeightFile:
    """Where the language model comes from: a local folder, a Hugging Face name, or the demo's own."""
    return WeightFile(
        "language model",
        name,
        "model.opt_model",
        is_hf_folder=True,
        build=_demo_language_model if name == "demo" else None,
    )


# What facebook/opt-NAME's config.json says, for counting parameters where it is not at hand (arXiv 2205.01068).
_OPT_GEOMETRY = {
    "facebook/opt-125m": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "facebook/opt-1.3b": dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=32),
    "facebook/opt-2.7b": dict(hidden_size=2560, num_hidden_layers=32, num_attention_heads=32),
    "facebook/opt-6.7b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32),
}


def opt_config(name: str, folder: Optional[Path]) -> OPTConfig:
    """The geometry of the language model ``name``: from its folder, else what is known of its name.

    Raises:
        MissingWeightsError: if nothing is known of it.
    """
    if folder is not None:
        return OPTConfig.from_pretrained(str(folder))
    if name == "demo":
        from lavis_kvmod.demo import parts

        return parts.language_model_config()
    if name not in _OPT_GEOMETRY:
        raise MissingWeightsError(
            f"language model: {name} is not on this machine, and its size is only known for {', '.join(_OPT_GEOMETRY)}"
        )
    geometry = _OPT_GEOMETRY[name]
    width = geometry["hidden_size"]
    return OPTConfig(vocab_size=50272, ffn_dim=4 * width, word_embed_proj_dim=width, **geometry)


def build_language_model(name: str, *, precision: str = "fp16", use_grad_checkpoint: bool = False, load: bool = True):
    """The frozen OPT and its tokenizer, from a Hugging Face name or folder.

    Weights are read file by file and stored in ``precision`` at once, so that no second copy of the model is held.
    With ``load=False`` the model has no weights (``meta`` device) and there is no tokenizer.

    Returns:
        (FrozenOPT, tokenizer or None)

    Raises:
        MissingWeightsError: if it is neither on disk nor to be downloaded.
        CheckpointError: if its files are not those of its config.
    """
    file = language_model_weights(name)
    folder = file.fetch() if load else file.local_path()
    with empty_weights():
        model = FrozenOPT(opt_config(name, folder))
    if use_grad_checkpoint:
        recompute_in_backward(model.model.decoder.layers)
    model.to(DTYPES[precision])
    model.tie_weights()
    if not load:
        return model, None

    state = read_folder(folder, DTYPES[precision])
    # Meta's own repositories hold the bare decoder; what transformers saves from OPTForCausalLM holds "model." too.
    state = {k if k.startswith(("model.", "lm_head.")) else f"model.{k}": v for k, v in state.items()}
    state.pop("model.decoder.version", None)
    tied = ["lm_head.weight"] if model.config.tie_word_embeddings else []
    load_weights(model, state, source=folder, may_lack=tied, assign=True)
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(str(folder), use_fast=False)
