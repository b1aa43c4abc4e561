"""The auxiliary encoders by name, and how to add one."""

from dataclasses import dataclass
from typing import Callable, Optional, Union

from lavis_kvmod.models.vision.auxiliary.encoder import Backbone
from lavis_kvmod.system.registry import Members, Registry

BuildBackbone = Callable[[str], Backbone]
Weights = Union[None, str, Callable[[str], Optional[str]]]


@dataclass(frozen=True)
class Family:
    """How an encoder, or a family of them, is built from its name, and where its published weights are."""

    build: BuildBackbone
    weights: Weights = None

    def default_file(self, name: str) -> Optional[str]:
        """The path or URL of the published weights of ``name``; None where there are none."""
        return self.weights(name) if callable(self.weights) else self.weights


AUXILIARY_ENCODERS: Registry[Family] = Registry("auxiliary encoder", "aux_encoder")


def register_auxiliary_encoder(
    *names: str, weights: Weights = None, members: Optional[Members] = None
) -> Callable[[BuildBackbone], BuildBackbone]:
    """Add auxiliary encoders: a decorator for the function that builds one from its name.

        @register_auxiliary_encoder("wikiart-resnet50")
        def wikiart_resnet50(name: str) -> Backbone:
            network = torchvision.models.resnet50()
            network.fc = nn.Identity()
            return Backbone(network, feature_dim=2048)  # feature_map: see there

    Args:
        names: what ``aux_encoder`` says; several names may share a function. A name that ends in a colon is that of a
            family: ``timm:`` stands for ``timm:NAME``.
        weights: path or URL of the published weights, or a function of the name that gives it; without,
            ``aux_checkpoint`` has to name a file.
        members: for a family, a function that lists its NAMEs.

    Raises:
        ValueError: if a name is taken, listing what there is.
    """

    def register(build: BuildBackbone) -> BuildBackbone:
        for name in names:
            AUXILIARY_ENCODERS.register(name, Family(build, weights), members)
        return build

    return register
