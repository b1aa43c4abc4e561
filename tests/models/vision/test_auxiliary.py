from argparse import Namespace

import pytest
import torch
from efficientnet_pytorch import EfficientNet
from torchvision import transforms

from lavis_kvmod.models.vision.auxiliary import (
    BLIP_MEAN,
    BLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_auxiliary_encoder,
)
from lavis_kvmod.system.schema import SettingsError
from lavis_kvmod.weights.files import CheckpointError
from lavis_kvmod.weights.finding import MissingWeightsError


@pytest.fixture(scope="module")
def b3(tmp_path_factory):
    """(an EfficientNet-B3 with its classifier, its weight file)"""
    torch.manual_seed(0)
    network = EfficientNet.from_name("efficientnet-b3").eval()
    path = tmp_path_factory.mktemp("aux") / "b3.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_b3_gives_1536_pooled_features_of_an_imagenet_image(b3):
    """The features are those of the network on the same picture, normalised its own way."""
    network, path = b3
    encoder = build_auxiliary_encoder("efficientnet-b3", str(path))
    assert encoder.feature_dim == 1536
    assert sum(p.numel() for p in encoder.parameters()) == 10_696_232
    picture = torch.rand(2, 3, 224, 224)
    as_blip = transforms.Normalize(BLIP_MEAN, BLIP_STD)(picture)
    as_imagenet = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)(picture)
    assert torch.allclose(encoder.renormalise(as_blip), as_imagenet, atol=1e-5)
    features = encoder(as_blip)
    with torch.no_grad():
        expected = network.extract_features(as_imagenet).mean((2, 3))
    assert features.shape == (2, 1536)
    assert torch.allclose(features, expected, rtol=1e-3, atol=1e-6 * expected.abs().max())


def test_it_stays_frozen_in_train_mode(files):
    encoder = build_auxiliary_encoder("efficientnet-b0", str(files.b0)).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    image = torch.randn(4, 3, 64, 64, requires_grad=True)
    first, second = encoder(image), encoder(image)
    assert torch.equal(first, second)  # no dropout, no dropped connection
    assert not first.requires_grad
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())


def test_image_size_resizes(files):
    encoder = build_auxiliary_encoder("efficientnet-b0", str(files.b0), image_size=64)
    seen = []
    encoder.backbone.register_forward_hook(lambda _, x, __: seen.append(tuple(x[0].shape)))
    encoder(torch.randn(1, 3, 40, 40))
    encoder(torch.randn(1, 3, 64, 64))
    assert seen == [(1, 3, 64, 64)] * 2


def test_lite0_brings_its_imagenet_weights():
    encoder = build_auxiliary_encoder("efficientnet-lite0", image_size=64)
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 1280)
    assert encoder.backbone._bn1.running_var.std() > 0  # trained statistics, not ones


@pytest.mark.parametrize(
    "name, width", [("timm:efficientnet_lite0", 1280), ("timm:efficientnet_b3", 1536), ("timm:resnet18", 512)]
)
def test_timm_encoders(tmp_path, name, width):
    import timm

    network = timm.create_model(name[5:], num_classes=7).eval()
    torch.save({"state_dict": network.state_dict()}, tmp_path / "net.pth")
    encoder = build_auxiliary_encoder(name, str(tmp_path / "net.pth"))
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, width)


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "module.", "bare module."])
def test_wrapped_files_and_any_number_of_classes(tmp_path, wrap):
    state = EfficientNet.from_name("efficientnet-b0", num_classes=27).state_dict()
    plain = build_auxiliary_encoder_from(state, tmp_path / "plain.pth")
    if wrap == "module.":
        state = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}
    elif wrap == "bare module.":
        state = {f"module.{k}": v for k, v in state.items()}
    elif wrap != "bare":
        state = {wrap: state, "epoch": 3}
    wrapped = build_auxiliary_encoder_from(state, tmp_path / "wrapped.pth")
    for key, value in plain.state_dict().items():
        assert torch.equal(value, wrapped.state_dict()[key])


def test_what_timm_saves_in_training(tmp_path):
    """Its script's arguments are beside the weights."""
    import timm
    from timm.utils import CheckpointSaver

    network = timm.create_model("resnet18", num_classes=5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    folders = dict(checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver = CheckpointSaver(model=network, optimizer=optimizer, args=Namespace(model="resnet18"), **folders)
    saver.save_checkpoint(0, metric=1.0)
    encoder = build_auxiliary_encoder("timm:resnet18", str(tmp_path / "last.pth.tar"))
    assert torch.equal(encoder.backbone.conv1.weight, network.conv1.weight)


def test_a_moco_file_gives_its_trained_network(tmp_path):
    """The momentum network and the queue are left out, as the projection head is."""
    import timm

    network = timm.create_model("resnet50", num_classes=7).eval()
    state = network.state_dict()
    head = {"fc.0.weight": torch.zeros(4, 2048), "fc.2.bias": torch.zeros(3)}
    queries = {**{k: v for k, v in state.items() if not k.startswith("fc.")}, **head}
    moco = {f"module.encoder_q.{k}": v for k, v in queries.items()}
    moco.update({f"module.encoder_k.{k}": v + 1 for k, v in queries.items()})
    moco.update({"module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1)})
    torch.save({"arch": "resnet50", "epoch": 200, "state_dict": moco}, tmp_path / "moco.pth.tar")
    encoder = build_auxiliary_encoder("timm:resnet50", str(tmp_path / "moco.pth.tar"))
    assert encoder.feature_dim == 2048
    for key, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, state[key])
    moco.pop("module.encoder_q.layer1.0.conv1.weight")
    torch.save({"state_dict": moco}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"1 missing:\s+layer1.0.conv1.weight"):
        build_auxiliary_encoder("timm:resnet50", str(tmp_path / "less.pth"))


def build_auxiliary_encoder_from(state, path):
    torch.save(state, path)
    return build_auxiliary_encoder("efficientnet-b0", str(path))


def test_what_does_not_fit_is_listed(tmp_path, b3):
    with pytest.raises(CheckpointError, match="of another shape"):
        build_auxiliary_encoder("efficientnet-b0", str(b3[1]))
    state = EfficientNet.from_name("efficientnet-b0").state_dict()
    del state["_conv_stem.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing:\s+_conv_stem.weight"):
        build_auxiliary_encoder_from(state, tmp_path / "less.pth")


def test_unknown_encoder_names_the_known():
    for name in ("efficientnet-b9", "timm:no_such_net", "resnet50"):
        with pytest.raises(ValueError, match=r"efficientnet-b0, .*efficientnet-b7.*timm:NAME.*got"):
            build_auxiliary_encoder(name)


def test_missing_file_names_the_key():
    with pytest.raises(MissingWeightsError, match="/nowhere/b3.pth; set model.aux_checkpoint to a local file"):
        build_auxiliary_encoder("efficientnet-b3", "/nowhere/b3.pth")


# ---------------------------------------------------------------- controls


def pooled_of(model, batch):
    return model.frozen_features(batch).pooled


def test_each_control_puts_other_features_in_the_same_place(build, images):
    batch = {"image": images(3)}
    own = build()
    pooled, tokens = pooled_of(own, batch), own.frozen_features(batch).visual_tokens
    trained = [(name, p.shape) for name, p in own.named_parameters() if p.requires_grad]
    found = {control: build(prefix_control=control) for control in ("constant", "shuffled", "untrained", "vit")}
    for model in found.values():
        assert [(name, p.shape) for name, p in model.named_parameters() if p.requires_grad] == trained
        assert torch.equal(model.frozen_features(batch).visual_tokens, tokens)
        assert pooled_of(model, batch).shape == pooled.shape and not torch.allclose(pooled_of(model, batch), pooled)
    assert len(pooled_of(found["constant"], batch).unique()) == 1
    assert torch.equal(pooled_of(found["shuffled"], batch), pooled[[2, 0, 1]])
    assert torch.equal(pooled_of(found["vit"], batch)[:, : tokens.shape[2]], tokens.mean(1))
    untrained = pooled_of(found["untrained"], batch)
    assert torch.equal(untrained, pooled_of(build(seed=5, prefix_control="untrained"), batch))
    assert 0.05 < untrained.std() < 20
    own.swap_prefix = found["vit"].swap_prefix = True  # at test time, of a trained model
    assert torch.equal(pooled_of(own, batch), pooled[[2, 0, 1]])
    assert torch.equal(pooled_of(found["vit"], batch)[:, : tokens.shape[2]], tokens.mean(1)[[2, 0, 1]])


def test_a_control_needs_a_prefix_and_a_known_name(build, images):
    with pytest.raises(SettingsError, match="prefix_control: vit needs kv_modulation: true"):
        build(prefix_control="vit", kv_modulation=False)
    with pytest.raises(SettingsError, match="prefix_control: expected one of none, constant, .* got 'noise'"):
        build(prefix_control="noise")
    model = build()
    model.prefix_control = "noise"
    with pytest.raises(ValueError, match="expected one of none, constant"):
        pooled_of(model, {"image": images(1)})


@pytest.mark.parametrize("name", ["efficientnet-b0", "efficientnet-lite0"])
def test_on_a_cpu_a_folded_copy_computes_the_same(name):
    """And follows the weights; what is saved stays the network's own."""
    encoder = build_auxiliary_encoder(name, load=False)
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
        norm.weight.data.uniform_(0.8, 1.6, generator=generator)
    names = set(encoder.state_dict())
    image = torch.randn(2, 3, 64, 64, generator=generator)
    for _ in range(2):
        expected = encoder.backbone(encoder.renormalise(image)).flatten(1)
        network = encoder._folded(encoder.backbone)
        assert network is not encoder.backbone and network is encoder._folded(encoder.backbone)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())
        torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        encoder.load_state_dict({key: value * 1.01 for key, value in encoder.state_dict().items()})
    assert set(encoder.state_dict()) == names
