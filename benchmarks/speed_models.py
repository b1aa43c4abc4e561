"""The models that `bench_speed.py` measures: ours and stock LAVIS's, at one geometry, with the same random weights."""

import tempfile
from pathlib import Path
from typing import Any, Dict

import torch
from full_size import write_tokenizer
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.modeling_opt import OPTForCausalLM
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from omegaconf import OmegaConf
from torch import nn
from transformers import GPT2Tokenizer

from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.models.language import opt
from lavis_kvmod.models.vision.encoders.eva import eva_clip_g

# What two CPU cores can take; on a GPU everything has its published size. `tiny` is for the tests.
GEOMETRIES: Dict[str, Dict[str, Any]] = {
    "two cores": dict(
        vit_geometry=dict(embed_dim=384, depth=12, num_heads=6, mlp_ratio=4.0), opt_model="facebook/opt-125m"
    ),
    "full size": {},
    "tiny": dict(
        vit_geometry=dict(embed_dim=32, depth=1, num_heads=2, mlp_ratio=2.0),
        qformer_geometry=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        opt_model="tiny",
        aux_encoder="efficientnet-b0",
    ),
}
# What Hugging Face's configuration calls the same sizes.
HF_SIZES: Dict[str, Dict[str, Dict[str, Any]]] = {
    "two cores": dict(
        vision=dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536),
        text=dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, ffn_dim=3072),
        qformer={},
    ),
    "full size": dict(
        vision=dict(hidden_size=1408, num_hidden_layers=39, num_attention_heads=16, intermediate_size=6144),
        text=dict(hidden_size=2560, num_hidden_layers=32, num_attention_heads=32, ffn_dim=10240),
        qformer={},
    ),
    "tiny": dict(
        vision=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64),
        text=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=128),
        qformer=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
    ),
}
MAX_TEXT = 48
opt._OPT_GEOMETRY["tiny"] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)


def build_ours(geometry: str, precision: str, device: str) -> Blip2OPTKVMod:
    """Our model; the frozen towers in ``precision``, what is trained in float32."""
    cfg = OmegaConf.load(Blip2OPTKVMod.default_config_path("pretrain_opt2.7b")).model
    cfg = OmegaConf.merge(
        cfg,
        dict(pretrained=None, vit_precision=precision, opt_precision=precision, max_txt_len=MAX_TEXT),
        GEOMETRIES[geometry],
    )
    model = Blip2OPTKVMod.without_weights(cfg)
    torch.manual_seed(0)
    _fill(model, device)
    model.opt_model.tie_weights()
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        model.opt_tokenizer = GPT2Tokenizer.from_pretrained(folder)
    model.eos_token_id = model.opt_tokenizer("\n", add_special_tokens=False).input_ids[0]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _fill(model: nn.Module, device: str) -> None:
    """Small random weights in place of those that have no memory yet; shared ones stay shared."""
    made: Dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                value = value.normal_(0, 0.02) if value.ndim > 1 else value.fill_(float(name == "weight"))
                made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def build_stock(ours: Blip2OPTKVMod, geometry: str, device: str) -> Blip2OPT:
    """LAVIS's own model, every part of LAVIS's class, with the weights of ours: float32 on a CPU, where LAVIS makes
    everything float32; on a GPU its frozen towers in fp16."""
    frozen = torch.float16 if device == "cuda" else torch.float32
    stock = Blip2OPT.__new__(Blip2OPT)
    nn.Module.__init__(stock)
    given = dict(GEOMETRIES[geometry].get("vit_geometry", {}))
    stock.visual_encoder = _same(eva_clip_g(224, 0.0, **given), ours.visual_encoder)
    stock.opt_model = _same(OPTForCausalLM(ours.opt_model.config), ours.opt_model)
    for tower in (stock.visual_encoder, stock.opt_model):
        tower.requires_grad_(False).to(device, frozen)
    stock.opt_model.tie_weights()
    stock.Qformer = _same(_qformer(ours, geometry), ours.Qformer).to(device)
    stock.ln_vision, stock.opt_proj, stock.query_tokens = ours.ln_vision, ours.opt_proj, ours.query_tokens
    stock.opt_tokenizer, stock.prompt, stock.max_txt_len = ours.opt_tokenizer, "", MAX_TEXT
    stock.eos_token_id = ours.eos_token_id
    return stock


def _same(module: nn.Module, of: nn.Module) -> nn.Module:
    module.load_state_dict(of.state_dict(), strict=False)
    return module


def _qformer(ours: Blip2OPTKVMod, geometry: str) -> BertLMHeadModel:
    config = BertConfig(**GEOMETRIES[geometry].get("qformer_geometry", {}))
    config.encoder_width, config.add_cross_attention = ours.visual_encoder.num_features, True
    config.cross_attention_freq, config.query_length = 2, ours.query_tokens.shape[1]
    qformer = BertLMHeadModel(config)
    qformer.cls = qformer.bert.embeddings.word_embeddings = qformer.bert.embeddings.position_embeddings = None
    for layer in qformer.bert.encoder.layer:
        layer.output = layer.intermediate = None
    return qformer


def text_of(model: Any, tokens: int) -> str:
    """A text of so many tokens, BOS and the closing newline among them."""
    text = "a"
    while len(model.opt_tokenizer(text + "\n").input_ids) < tokens:
        text += " a"
    return text
