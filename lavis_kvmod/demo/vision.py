"""The demo's image encoder: a small EVA-style ViT that sees luminance only, pre-trained on grey digits.

It knows shape and is blind to colour, so that in the demo a colour can reach the language model through the KV prefix
alone.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.eva_vit import VisionTransformer
from lavis.processors.blip_processors import BlipImageBaseProcessor
from torch import Tensor, nn

from lavis_kvmod.demo import digits
from lavis_kvmod.system.progress import Progress

__all__ = [
    "Lesson",
    "LuminanceVisionTransformer",
    "VisionRecipe",
    "build_vision_encoder",
    "eva_arguments",
    "photometric",
    "train_vision_encoder",
]

# Mean and standard deviation of a picture's luminance (0 … 1), roughly those of dark ink on light paper.
Luminance = Union[float, Tensor]

_LUMINANCE_MEAN = 0.6
_LUMINANCE_STD = 0.2
_GEOMETRY = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")


class LuminanceVisionTransformer(VisionTransformer):
    """LAVIS's ViT behind a fixed luminance step: two pictures of one luminance are one picture to it.

    The step has neither parameters nor buffers, so the state dict is that of LAVIS's class. Arguments are LAVIS's.
    """

    def forward_features(self, x: Tensor) -> Tensor:
        """BLIP-normalised image (b, 3, H, W) -> tokens (b, 1 + n, embed_dim), the class token first."""
        return super().forward_features(self.seen(x))

    def get_intermediate_layers(self, x: Tensor) -> List[Tensor]:
        """As `forward_features`, one entry for each block."""
        return super().get_intermediate_layers(self.seen(x))

    def seen(self, image: Tensor) -> Tensor:
        """What of a BLIP-normalised image reaches the patch embedding, (b, 3, H, W)."""
        return self.luminance(image)

    @staticmethod
    def luminance(image: Tensor) -> Tensor:
        """BLIP-normalised image (b, 3, H, W) -> its standardised luminance, three times: (b, 3, H, W)."""
        weights, offset = _luminance_of_normalised()
        red, green, blue = image.unbind(1)
        grey = weights[0] * red + weights[1] * green + weights[2] * blue + offset
        return grey.unsqueeze(1).expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class VisionRecipe:
    """Geometry and pre-training of the demo's ViT. The defaults are the demo's."""

    image_size: int = 56
    patch_size: int = 14
    embed_dim: int = 128
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: float = 4.0
    steps: int = 350
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    seed: int = 0

    def geometry(self) -> Dict[str, Any]:
        """What `build_vision_encoder` takes beside the image size."""
        return {name: getattr(self, name) for name in _GEOMETRY}


def build_vision_encoder(image_size: int = 56, **geometry: Any) -> LuminanceVisionTransformer:
    """The demo's ViT without its weights; ``geometry`` overrides `VisionRecipe`'s, such as ``depth=2``.

    All else is as in LAVIS's ``create_eva_vit_g``: biases on queries and values, LayerNorm eps 1e-6, no final norm
    (BLIP-2 puts ``ln_vision`` behind it).
    """
    return LuminanceVisionTransformer(**eva_arguments(image_size, geometry))


def eva_arguments(image_size: int, geometry: Mapping[str, Any]) -> Dict[str, Any]:
    """What LAVIS's class takes for a ViT of the demo."""
    return dict(
        img_size=image_size,
        use_mean_pooling=False,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **{**VisionRecipe().geometry(), **geometry},
    )


class Lesson(NamedTuple):
    """A batch to learn from: pictures (b, 3, H, W), and what is asked beside their digits, -100 where it is not."""

    picture: Tensor
    also: Mapping[str, Tensor] = {}


def train_vision_encoder(
    recipe: VisionRecipe,
    encoder: Optional[LuminanceVisionTransformer] = None,
    lesson: Optional[Callable[[Tensor], Lesson]] = None,
    also: Mapping[str, int] = {},
) -> Tuple[Dict[str, Tensor], float]:
    """Pre-train ViT and ``ln_vision`` as a digit classifier on renderings of the train scans.

    Every token is asked for the digit, not their mean alone, so that what a Q-Former attends to carries shape
    wherever it looks. The linear heads are thrown away. Draws from torch's global generator.

    Args:
        encoder: of the recipe's geometry, by default the one that is blind to colour.
        lesson: makes a batch of ink (b, 1, H, W) that has been moved; by default grey pictures.
        also: what else a lesson asks, with the number of answers: asked of the mean token.

    Returns:
        State dict with keys ``visual_encoder.*`` and ``ln_vision.*``, and the head's accuracy on the val scans.
    """
    encoder = build_vision_encoder(recipe.image_size, **recipe.geometry()) if encoder is None else encoder
    _initialise(encoder)
    parts = nn.ModuleDict({"visual_encoder": encoder, "ln_vision": LayerNorm(recipe.embed_dim)}).train()
    head = nn.Linear(recipe.embed_dim, len(digits.DIGIT_WORDS))
    heads = nn.ModuleDict({name: nn.Linear(recipe.embed_dim, answers) for name, answers in also.items()})
    parameters = [*parts.parameters(), *head.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.steps + 1, pct_start=0.15
    )

    def tokens(image: Tensor) -> Tensor:  # (b, 3, H, W) -> (b, 1 + n, width)
        return parts["ln_vision"](parts["visual_encoder"](image))

    ink, labels = _coverage_and_digits(digits.load_scans("train"), recipe.image_size)
    progress = Progress(range(recipe.steps), "demo: pre-training the image encoder", log_every=100)
    for _ in progress:
        rows = torch.randint(len(ink), (recipe.batch_size,))
        seen = (lesson or _grey_lesson)(_moved(ink[rows]))
        of_tokens = tokens(seen.picture)
        logits = head(of_tokens)
        every_token = labels[rows].repeat_interleave(logits.shape[1])
        loss = F.cross_entropy(logits.flatten(0, 1), every_token, label_smoothing=0.05)
        loss = loss + F.cross_entropy(logits.mean(1), labels[rows], label_smoothing=0.05)
        for name, asked in seen.also.items():
            loss = loss + F.cross_entropy(heads[name](of_tokens.mean(1)), asked, reduction="sum") / len(rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.status(f"loss {loss.item():.3f}")

    parts.eval()
    with torch.no_grad():
        ink, labels = _coverage_and_digits(digits.load_scans("val"), recipe.image_size)
        guess = head(tokens(_grey(ink))).mean(1).argmax(1)
    return parts.state_dict(), (guess == labels).float().mean().item()


def _initialise(encoder: LuminanceVisionTransformer) -> None:
    """Random weights for a narrow ViT that has to learn in minutes.

    LAVIS's are for a width of 1408 and long training: with them this one takes hundreds of steps to tell positions
    apart.
    """
    width = encoder.embed_dim
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=width**-0.5)
    encoder.fix_init_weight()
    nn.init.normal_(encoder.pos_embed, std=0.5)


def _luminance_of_normalised() -> Tuple[Sequence[float], float]:
    """Weights of BLIP-normalised channels, and an offset, that give the standardised luminance."""
    blip = _BLIP.normalize
    weights = [w * std / _LUMINANCE_STD for w, std in zip(digits.LUMA, blip.std)]
    black = sum(w * mean for w, mean in zip(digits.LUMA, blip.mean))
    return weights, (black - _LUMINANCE_MEAN) / _LUMINANCE_STD


_BLIP = BlipImageBaseProcessor()


# ---------------------------------------------------------------- grey digits, augmented in batches


def _coverage_and_digits(scans: Sequence[digits.Scan], size: int) -> Tuple[Tensor, Tensor]:
    """Ink (N, 1, size, size), 0 … 1, and labels (N,)."""
    ink = np.stack([digits.coverage(scan, size) for scan in scans])
    return torch.from_numpy(ink).unsqueeze(1), torch.tensor([scan.digit for scan in scans])


def _moved(ink: Tensor) -> Tensor:
    """Ink (b, 1, H, W), each picture shifted, turned, sheared and scaled a little; what enters is paper."""
    count = len(ink)

    def spread(limit: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape) * 2 - 1) * limit

    angle, shear = spread(0.26), spread(0.15)
    scale = 1 + spread(0.12, 2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    theta = torch.stack(
        [
            torch.stack([cos * scale[:, 0], (shear - sin) * scale[:, 1]], 1),
            torch.stack([sin * scale[:, 0], cos * scale[:, 1]], 1),
        ],
        1,
    )  # (b, 2, 2)
    theta = torch.cat([theta, spread(0.16, 2, 1)], 2)  # (b, 2, 3), shifts in half-widths
    grid = F.affine_grid(theta, list(ink.shape), align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False, padding_mode="zeros")


def photometric(ink: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Ink with grain (b, 1, H, W), and the luminance of ink and paper (b, 1, 1, 1) drawn around the demo's."""
    count = len(ink)
    dark = digits.INK_LUMINANCE + (torch.rand(count, 1, 1, 1) * 2 - 1) * 24
    light = digits.PAPER_LUMINANCE + (torch.rand(count, 1, 1, 1) * 2 - 1) * 24
    return ink + torch.randn_like(ink) * 0.02, dark, light


def _grey_lesson(ink: Tensor) -> Lesson:
    return Lesson(_grey(*photometric(ink)))


def _grey(ink: Tensor, dark: Luminance = digits.INK_LUMINANCE, light: Luminance = digits.PAPER_LUMINANCE) -> Tensor:
    """Ink (b, 1, H, W) as a grey picture, BLIP-normalised: (b, 3, H, W)."""
    picture = (light + (dark - light) * ink) / 255
    return _BLIP.normalize(picture.expand(-1, 3, -1, -1))
