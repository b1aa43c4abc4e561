"""LAVIS's stage-1 models at small geometry, and ours with the same weights."""

import torch
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from small_vit import SIZE, small_vit
from torch import nn
from transformers import BertTokenizer

from lavis_kvmod.demo.words import save_vocabulary
from lavis_kvmod.models.blip2_kvmod import Blip2KVMod
from lavis_kvmod.models.connectors.kv_prefix import KVPrefixGenerator
from lavis_kvmod.models.connectors.qformer import QFormer

QUERIES, EMBED = 5, 16
QFORMER = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
TEXTS = ["a red seven on white paper", "a blue one on sky paper", "a green two on pink paper", "a grey nine on paper"]
SAMPLES = 4


def make_tokenizer(folder):
    """The demo's words, with [DEC] as BOS as LAVIS adds it."""
    save_vocabulary(folder)
    made = BertTokenizer.from_pretrained(str(folder))
    made.add_special_tokens({"bos_token": "[DEC]"})
    return made


def stock_class(base, tokenizer):
    class Small(base):
        """LAVIS's class, its methods untouched, assembled at small geometry."""

        @classmethod
        def init_tokenizer(cls):
            return tokenizer

        @classmethod
        def init_vision_encoder(cls, *args):
            vit = small_vit()
            return vit, LayerNorm(vit.num_features)

        @classmethod
        def init_Qformer(cls, num_query_token, vision_width, cross_attention_freq=2):
            config = BertConfig(vocab_size=len(tokenizer), **QFORMER)
            config.encoder_width = vision_width
            config.add_cross_attention = True
            config.cross_attention_freq = cross_attention_freq
            config.query_length = num_query_token
            tokens = nn.Parameter(torch.randn(1, num_query_token, config.hidden_size) * 0.02)
            return BertLMHeadModel(config), tokens

    return Small


def ours_like(stock, cls=Blip2KVMod, prefix=False, **options):
    vit, norm = stock.visual_encoder, stock.ln_vision
    torch.manual_seed(5)
    qformer = QFormer(
        encoder_width=vit.num_features,
        num_queries=QUERIES,
        vocab_size=len(stock.tokenizer),
        word_head=True,
        **QFORMER,
    )
    if prefix:
        options["kv_prefix"] = KVPrefixGenerator(12, QFORMER["hidden_size"], 3, QFORMER["num_attention_heads"])
        options["aux_encoder"] = Pooled()
    model = cls(
        tokenizer=stock.tokenizer,
        embed_dim=EMBED,
        visual_encoder=vit,
        ln_vision=norm,
        qformer=qformer,
        num_query_token=QUERIES,
        image_size=SIZE,
        max_txt_len=12,
        **options,
    )
    report = model.load_state_dict(stock.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all(key.startswith(("kv_", "aux_encoder", "momentum", "queue")) for key in report.missing_keys)
    return model


class Pooled(nn.Module):
    """A second encoder that tells images apart: twelve means."""

    feature_dim = 12

    def forward(self, image):
        return nn.functional.adaptive_avg_pool2d(image, 2).flatten(1)


def make_stock(base, tokenizer):
    torch.manual_seed(0)
    model = stock_class(base, tokenizer)(
        img_size=SIZE, num_query_token=QUERIES, embed_dim=EMBED, max_txt_len=12, freeze_vit=True
    )
    with torch.no_grad():  # far from the tiny initial weights, so that a wrong mask or scale shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim else 0))
    return model.float()
