"""Small real models: LAVIS's own classes and real files, at a geometry that runs in milliseconds."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lavis.models import eva_vit
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from omegaconf import OmegaConf
from tokenizers import ByteLevelBPETokenizer
from torch import nn

from lavis_kvmod import Blip2OPTKVMod

# These models are too small to share out: threads would only wait for each other, and for whatever else runs.
torch.set_num_threads(1)

SIZE = 28  # image side in pixels: 2 x 2 patches
VIT = dict(patch_size=14, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.0)
QFORMER = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
QUERIES = 5
TEXTS = [
    "Question: which digit is written Short answer: seven\n",
    "Question: what colour is the ink Short answer: red\n",
    "Question: is the digit even Short answer: yes\n",
    "a photo of a cat on a mat\n",
]


@pytest.fixture(scope="session")
def opt_folder(tmp_path_factory):
    """A Hugging Face folder with a small random OPT and a byte-level BPE tokenizer like OPT's."""
    folder = tmp_path_factory.mktemp("opt")
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(TEXTS, vocab_size=400, min_frequency=1, special_tokens=special)
    bpe.save_model(str(folder))
    from transformers import GPT2Tokenizer

    GPT2Tokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=128,
        init_std=0.2,  # far from flat, so that beams and answers differ
        dropout=0.1,
    )
    # LAVIS always loads OPT in fp16: numbers that fp16 holds exactly make both loaders give the same weights.
    OPTForCausalLM(config).half().float().save_pretrained(folder)
    return folder


def small_vit():
    return eva_vit.VisionTransformer(
        img_size=SIZE,
        use_mean_pooling=False,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **VIT,
    )


class SmallBlip2OPT(Blip2OPT):
    """LAVIS's Blip2OPT, its forward and generate untouched, assembled at small geometry."""

    @classmethod
    def init_tokenizer(cls):
        return None  # BERT's, which the OPT path never uses

    @classmethod
    def init_vision_encoder(cls, *args):
        vit = small_vit()
        return vit, LayerNorm(vit.num_features)

    @classmethod
    def init_Qformer(cls, num_query_token, vision_width, cross_attention_freq=2):
        config = BertConfig(vocab_size=50, **QFORMER)
        config.encoder_width = vision_width
        config.add_cross_attention = True
        config.cross_attention_freq = cross_attention_freq
        config.query_length = num_query_token
        tokens = nn.Parameter(torch.randn(1, num_query_token, config.hidden_size) * 0.02)
        return BertLMHeadModel(config), tokens


@pytest.fixture(scope="session")
def files(tmp_path_factory, opt_folder):
    """Weight files as users have them: a ViT, a stock BLIP-2 checkpoint, an EfficientNet-B0, an OPT folder."""
    from efficientnet_pytorch import EfficientNet

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    stock = SmallBlip2OPT(opt_model=str(opt_folder), num_query_token=QUERIES)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if not name.startswith("opt_model."):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    state = stock.state_dict()
    vit = {k[len("visual_encoder.") :]: v for k, v in state.items() if k.startswith("visual_encoder.")}
    torch.save(vit, folder / "eva_vit.pth")
    trained = {k: v for k, v in state.items() if not k.startswith(("visual_encoder.", "opt_model."))}
    torch.save({"model": trained}, folder / "blip2.pth")
    b0 = EfficientNet.from_name("efficientnet-b0")
    for module in b0.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of what it sees, or random weights fade to nothing
    with torch.no_grad():
        b0.train()(torch.randn(8, 3, 64, 64))
    torch.save(b0.state_dict(), folder / "b0.pth")
    return SimpleNamespace(
        vit=folder / "eva_vit.pth",
        blip2=folder / "blip2.pth",
        b0=folder / "b0.pth",
        opt=opt_folder,
    )


@pytest.fixture(scope="session")
def model_config(files):
    """A function: the ``model:`` section of a small model from those files, with overrides."""

    def make(**overrides):
        return OmegaConf.create(
            {
                "arch": "blip2_opt_kvmod",
                "load_finetuned": False,
                "pretrained": str(files.blip2),
                "image_size": SIZE,
                "vit_checkpoint": str(files.vit),
                "vit_geometry": VIT,
                "vit_precision": "fp32",
                "qformer_geometry": QFORMER,
                "num_query_token": QUERIES,
                "opt_model": str(files.opt),
                "opt_precision": "fp32",
                "aux_encoder": "efficientnet-b0",
                "aux_checkpoint": str(files.b0),
                "aux_image_size": 64,
                **overrides,
            }
        )

    return make


@pytest.fixture()
def build(model_config):
    """A function: a small model, seeded, with overrides of its config."""

    def make(seed=0, **overrides) -> Blip2OPTKVMod:
        torch.manual_seed(seed)
        return Blip2OPTKVMod.from_config(model_config(**overrides))

    return make


@pytest.fixture()
def stock(files):
    """LAVIS's own Blip2OPT with the same weights, on the CPU."""
    from lavis_kvmod import checkpoints

    torch.manual_seed(0)
    model = SmallBlip2OPT(opt_model=str(files.opt), num_query_token=QUERIES).float()
    model.visual_encoder.load_state_dict(checkpoints.read_weights(files.vit))
    model.load_state_dict(checkpoints.read_weights(files.blip2), strict=False)
    return model


def _images(b, seed=0):
    return torch.randn(b, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture()
def images():
    """A function: b random images as BLIP's processor gives them."""
    return _images


@pytest.fixture()
def vqa_batch():
    """Two questions with three and one answers, as LAVIS's VQA collater gives them."""
    return {
        "image": _images(2),
        "text_input": ["which digit is written", "what colour is the ink"],
        "answer": ["seven", "one", "nine", "red"],
        "weight": torch.tensor([0.6, 0.3, 0.1, 1.0]),
        "n_answers": torch.tensor([3, 1]),
        "prompt": "Question: {} Short answer:",
    }
