"""Parts from outside the package: registered by a user, named in a ``model:`` section, built into a model."""

import pytest
import torch
from torch import nn

import lavis_kvmod
from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.models import build as building
from lavis_kvmod.models.connectors import CONNECTORS
from lavis_kvmod.models.connectors.qformer import QFormerOutput
from lavis_kvmod.models.settings import ModelSettings, SettingsError
from lavis_kvmod.models.vision.auxiliary import AUXILIARY_ENCODERS
from lavis_kvmod.models.vision.encoders import VISION_ENCODERS

WIDTH = 24


@pytest.fixture()
def added(monkeypatch):
    """Whatever a test registers is gone after it."""
    for registry in (AUXILIARY_ENCODERS, VISION_ENCODERS, CONNECTORS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        monkeypatch.setattr(registry, "_members", dict(registry._members))


def small_resnet():
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=0, stem_width=8)


class PatchTransformer(nn.Module):
    """A small ViT of PyTorch's own layers, with a position for each patch."""

    def __init__(self, image_size):
        super().__init__()
        self.num_features = WIDTH
        self.patches = nn.Conv2d(3, WIDTH, 14, 14)
        self.positions = nn.Parameter(torch.randn((image_size // 14) ** 2, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).layers

    def forward(self, image):
        tokens = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class MeanConnector(nn.Module):
    """Every query is told the mean visual token."""

    num_attention_heads, num_cross_attention_layers = 0, 0

    def __init__(self, visual_width, hidden_size):
        super().__init__()
        self.hidden_size = hidden_size
        self.proj = nn.Linear(visual_width, hidden_size)

    def forward(self, query_embeds, encoder_hidden_states, prefix=None, output_attentions=False):
        return QFormerOutput(query_embeds + self.proj(encoder_hidden_states.mean(1, keepdim=True)))


def trains(model, batch):
    model.train()({**batch})["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert len(model.eval().generate({"image": batch["image"]}, num_beams=2, max_length=3)) == len(batch["image"])


def test_an_auxiliary_encoder(added, build, vqa_batch, tmp_path):
    @lavis_kvmod.register_auxiliary_encoder("tiny-resnet")
    def tiny_resnet(name):
        network = small_resnet()
        return lavis_kvmod.Backbone(network, feature_dim=network.num_features)

    torch.manual_seed(0)
    torch.save({"model": small_resnet().state_dict()}, tmp_path / "resnet.pth")
    model = build(aux_encoder="tiny-resnet", aux_checkpoint=str(tmp_path / "resnet.pth"))
    assert model.aux_encoder.feature_dim == 512
    assert torch.equal(
        model.aux_encoder.backbone.conv1.weight, torch.load(tmp_path / "resnet.pth")["model"]["conv1.weight"]
    )
    trains(model, vqa_batch)


def test_its_published_weights(added, build, tmp_path):
    file = tmp_path / "published.pth"
    torch.save(small_resnet().state_dict(), file)

    @lavis_kvmod.register_auxiliary_encoder("tiny-resnet-18", "tiny-resnet-34", weights=str(file))
    def tiny_resnet(name):
        return lavis_kvmod.Backbone(small_resnet(), 512)

    build(aux_encoder="tiny-resnet-34", aux_checkpoint=None)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="auxiliary encoder tiny-resnet-18.*set model.aux_checkpoint"):
        build(aux_encoder="tiny-resnet-18", aux_checkpoint=None)


def test_an_image_encoder(added, build, vqa_batch, tmp_path):
    @lavis_kvmod.register_image_encoder("patches")
    def patches(image_size, drop_path_rate, **geometry):
        return PatchTransformer(image_size)

    torch.manual_seed(0)
    weights = {f"visual_encoder.{k}": v for k, v in PatchTransformer(28).state_dict().items()}
    weights.update({"ln_vision.weight": torch.ones(WIDTH), "ln_vision.bias": torch.zeros(WIDTH)})
    torch.save(weights, tmp_path / "vit.pth")
    model = build(vit_model="patches", vit_checkpoint=str(tmp_path / "vit.pth"), vit_geometry={}, pretrained=None)
    assert torch.equal(model.visual_encoder.positions, weights["visual_encoder.positions"])
    assert not model.visual_encoder.training and not model.visual_encoder.positions.requires_grad
    trains(model, vqa_batch)


def test_a_connector(added, model_config, vqa_batch):
    @lavis_kvmod.register_connector("mean")
    def mean(settings, sizes):
        return MeanConnector(sizes.visual_width, hidden_size=16)

    settings = ModelSettings.from_config(model_config(connector="mean", kv_modulation=False, pretrained=None))
    model = Blip2OPTKVMod(**building.opt_arguments(settings))
    assert model.query_tokens.shape == (1, 5, 16)
    trains(model, vqa_batch)


def test_names_that_are_taken_or_unknown(added, model_config):
    with pytest.raises(ValueError, match="'efficientnet-b3' is there already.*there are efficientnet-b0"):
        lavis_kvmod.register_auxiliary_encoder("efficientnet-b3")(lambda name: None)
    with pytest.raises(ValueError, match="'eva_clip_g' is there already.*there are .*clip_L"):
        lavis_kvmod.register_image_encoder("eva_clip_g")(lambda *args: None)
    with pytest.raises(ValueError, match="'qformer' is there already.*there are qformer"):
        lavis_kvmod.register_connector("qformer")(lambda *args: None)
    with pytest.raises(SettingsError, match="aux_encoder: .*got 'timm:resnet5'; did you mean timm:resnet50"):
        ModelSettings.from_config(model_config(aux_encoder="timm:resnet5"))
    with pytest.raises(ValueError, match="connector: expected one of qformer.*; got 'qfromer'; did you mean qformer"):
        CONNECTORS["qfromer"]
