"""The demo's image encoder once more, for one question: what is a prefix worth where the ViT knows colour itself?

The same ViT, which is shown colours, too. A share of the pictures that it is pre-trained on are coloured, and it is
asked for their ink and paper. Its patch embedding starts blind: with a share of 0 it stays so.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Dict, Tuple

import torch
from lavis.processors.blip_processors import BlipImageBaseProcessor
from torch import Tensor

from lavis_kvmod.demo import digits
from lavis_kvmod.demo.vision import (
    Lesson,
    LuminanceVisionTransformer,
    VisionRecipe,
    eva_arguments,
    photometric,
    train_vision_encoder,
)

__all__ = [
    "ColourVisionRecipe",
    "ColourVisionTransformer",
    "build_colour_vision_encoder",
    "train_colour_vision_encoder",
]

_CHROMA_STD = 0.4
_NOT_ASKED = -100

_BLIP = BlipImageBaseProcessor()


class ColourVisionTransformer(LuminanceVisionTransformer):
    """LAVIS's ViT behind a fixed step to luminance and two differences of colour; arguments are LAVIS's.

    A grey picture has no differences, so on grey pictures the weights that read them are not trained; they start at 0.
    """

    def fix_init_weight(self) -> None:
        """As LAVIS's, the last step of its initialisation; then the weights that read colour are set to 0."""
        super().fix_init_weight()
        with torch.no_grad():
            self.patch_embed.proj.weight[:, 1:] = 0

    def seen(self, image: Tensor) -> Tensor:
        """BLIP-normalised image (b, 3, H, W) -> its standardised luminance, red less it, blue less it."""
        luminance = self.luminance(image)[:, 0]
        mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (_BLIP.normalize.mean, _BLIP.normalize.std))
        red, green, blue = (image * std + mean).unbind(1)
        grey = sum(weight * part for weight, part in zip(digits.LUMA, (red, green, blue)))
        # In steps of a picture's: what rounding leaves of a grey one would be learnt from, however small (AdamW).
        steps = [((part - grey) * 255).round() / 255 for part in (red, blue)]
        return torch.stack([luminance, *(step / _CHROMA_STD for step in steps)], dim=1)


@dataclass(frozen=True)
class ColourVisionRecipe(VisionRecipe):
    """As the demo's, trained longer; ``colour_share`` (0 … 1) of the pictures are coloured."""

    steps: int = 500
    colour_share: float = 0.0


def build_colour_vision_encoder(image_size: int = 56, **geometry: Any) -> ColourVisionTransformer:
    """This ViT without its weights; ``geometry`` as for `lavis_kvmod.demo.vision.build_vision_encoder`."""
    return ColourVisionTransformer(**eva_arguments(image_size, geometry))


def train_colour_vision_encoder(recipe: ColourVisionRecipe) -> Tuple[Dict[str, Tensor], float]:
    """As `lavis_kvmod.demo.vision.train_vision_encoder`, with ink and paper asked where a picture has them."""
    return train_vision_encoder(
        recipe,
        build_colour_vision_encoder(recipe.image_size, **recipe.geometry()),
        partial(_lesson, share=recipe.colour_share),
        {"ink": len(digits.INKS), "paper": len(digits.PAPERS)},
    )


def _lesson(ink: Tensor, share: float) -> Lesson:
    count = len(ink)
    ink, dark, light = photometric(ink)
    coloured = torch.rand(count) < share
    which = {"ink": torch.randint(len(digits.INKS), (count,)), "paper": torch.randint(len(digits.PAPERS), (count,))}
    of_ink = _shown(digits.INKS, which["ink"], coloured, dark, digits.INK_LUMINANCE)
    of_paper = _shown(digits.PAPERS, which["paper"], coloured, light, digits.PAPER_LUMINANCE)
    picture = (of_paper + (of_ink - of_paper) * ink) / 255
    return Lesson(
        _BLIP.normalize(picture),
        {name: value.where(coloured, torch.tensor(_NOT_ASKED)) for name, value in which.items()},
    )


def _shown(colours: Dict[str, Any], which: Tensor, coloured: Tensor, luminance: Tensor, usual: float) -> Tensor:
    """RGB (b, 3, 1, 1) of a colour moved to a luminance (b, 1, 1, 1), or grey of that luminance."""
    chosen = torch.tensor(list(colours.values()), dtype=torch.float32)[which].view(-1, 3, 1, 1)
    return torch.where(coloured.view(-1, 1, 1, 1), chosen + luminance - usual, luminance.expand(-1, 3, -1, -1))
