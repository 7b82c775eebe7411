"""Parts of one's own, as a user would write them: a registry folder with a head and a backbone beside their cards, sound or broken."""

from __future__ import annotations

from pathlib import Path

HEAD_CARD = """# A head of mine: a hidden layer of pointwise convolutions over two depths
builder = "my_head.py:{name}"
levels  = {levels}
pixels  = {pixels}
[options]
width = 16
{more}
"""

# Sound, and then broken one way each, by the contract that must notice.
HEADS = '''"""A head of mine."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cellbench.models.backbones.base import Level
from cellbench.models.heads.base import Head, conv_bn_relu, resize


@dataclass(frozen=True)
class Sizes:  # a dataclass looks its module up by name
    width: int


class Sound(Head):
    def __init__(self, levels: tuple[Level, ...], num_classes: int, *, width: int) -> None:
        super().__init__(levels, num_classes)
        sizes = Sizes(width)
        self.hidden = nn.ModuleList(conv_bn_relu(level.dim, sizes.width, 1) for level in levels)
        self.score = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: list[Tensor], pixels_BCHW: Tensor) -> Tensor:
        size = tuple(maps[0].shape[-2:])
        merged = sum(resize(hidden(m), size) for hidden, m in zip(self.hidden, maps, strict=True))
        return resize(self.score(merged), tuple(pixels_BCHW.shape[-2:]))


class WrongShape(Sound):
    def forward(self, maps, pixels_BCHW):
        return super().forward(maps, pixels_BCHW)[:, :, 1:]


class WrongClasses(Sound):
    def __init__(self, levels, num_classes, *, width):
        super().__init__(levels, 2, width=width)


class TurnedGrid(Sound):
    def forward(self, maps, pixels_BCHW):
        return super().forward([m.transpose(2, 3).reshape(m.shape) for m in maps], pixels_BCHW)


class UpsideDown(Sound):
    def forward(self, maps, pixels_BCHW):
        return super().forward(maps, pixels_BCHW).flip(2)


class SharedStatistics(Sound):
    def __init__(self, levels, num_classes, *, width):
        super().__init__(levels, num_classes, width=width)
        self.norm = nn.BatchNorm2d(num_classes, track_running_stats=False)

    def forward(self, maps, pixels_BCHW):
        return self.norm(super().forward(maps, pixels_BCHW))


class UnusedLayer(Sound):
    def __init__(self, levels, num_classes, *, width):
        super().__init__(levels, num_classes, width=width)
        self.forgotten = nn.Linear(3, 3)


class Detached(Sound):
    def forward(self, maps, pixels_BCHW):
        size = tuple(maps[0].shape[-2:])
        merged = sum(resize(hidden(m), size).detach() for hidden, m in zip(self.hidden, maps, strict=True))
        return resize(self.score(merged), tuple(pixels_BCHW.shape[-2:]))


class LastLevelOnly(Sound):
    def __init__(self, levels, num_classes, *, width):
        super().__init__(levels[-1:], num_classes, width=width)

    def forward(self, maps, pixels_BCHW):
        return super().forward(maps[-1:], pixels_BCHW)


class SecretPixels(Sound):
    def forward(self, maps, pixels_BCHW):
        return super().forward(maps, pixels_BCHW) + 0.1 * pixels_BCHW.mean(1, keepdim=True)


class OptionNotOnCard(Sound):
    def __init__(self, levels, num_classes, *, width, depth=2):
        super().__init__(levels, num_classes, width=width)


class AnyOption(Sound):
    def __init__(self, levels, num_classes, **options):
        super().__init__(levels, num_classes, width=options["width"])


class ThroughNumpy(Sound):
    def forward(self, maps, pixels_BCHW):
        weight = float(np.tanh(maps[0].detach().numpy()).max() > 2)
        return super().forward(maps, pixels_BCHW) + weight


class OwnDice(Sound):
    def __init__(self, levels, num_classes, *, width):
        super().__init__(levels, num_classes, width=width)
        with torch.no_grad():
            self.score.bias.copy_(torch.from_numpy(np.random.default_rng().random(num_classes)))


class WithDropout(Sound):
    def __init__(self, levels, num_classes, *, width):
        super().__init__(levels, num_classes, width=width)
        self.drop = nn.Dropout(0.5)

    def forward(self, maps, pixels_BCHW):
        return super().forward([self.drop(m) for m in maps], pixels_BCHW)


class WithNoise(Sound):
    def forward(self, maps, pixels_BCHW):
        scores = super().forward(maps, pixels_BCHW)
        return scores + torch.randn_like(scores) if self.training else scores


class LateNoise(Sound):
    """Draws nothing in its first steps, and later not in each."""

    def __init__(self, levels, num_classes, *, width):
        super().__init__(levels, num_classes, width=width)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, maps, pixels_BCHW):
        scores = super().forward(maps, pixels_BCHW)
        if self.training:
            self.step += 1
            if int(self.step) % 5 == 4:
                return nn.functional.dropout(scores, 0.5)
        return scores


class AlwaysDropping(Sound):
    def forward(self, maps, pixels_BCHW):
        return super().forward([nn.functional.dropout(m, 0.1) for m in maps], pixels_BCHW)


class NumpyNoise(Sound):
    def forward(self, maps, pixels_BCHW):
        return super().forward(maps, pixels_BCHW) * (1 + np.random.rand() * self.training)


class OwnGenerator(Sound):
    """Repeatable from its start, and not from where it was interrupted."""

    def __init__(self, levels, num_classes, *, width):
        super().__init__(levels, num_classes, width=width)
        self.source = np.random.default_rng(0)

    def forward(self, maps, pixels_BCHW):
        return super().forward(maps, pixels_BCHW) * (1 + self.source.random() * self.training)


class NoSuchImport(Sound):
    def __init__(self, levels, num_classes, *, width):
        raise ModuleNotFoundError("No module named 'einops'")
'''

BACKBONE_CARD = """# A backbone of mine: one linear map of each patch
builder  = "my_backbone.py:{name}"
weights  = "{weights}"
license  = "MIT"
source   = "a test"
patch_px = 8
dim      = 24
depth    = {depth}
params_m = {params_m}
mean     = [0.5, 0.5, 0.5]
std      = [0.25, 0.25, 0.25]
"""

BACKBONES = '''"""A backbone of mine."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from cellbench.models.backbones.base import Backbone, Level
from cellbench.config.cards import BackboneCard


class Patches(Backbone):
    def __init__(self, card: BackboneCard, dim: int = 24) -> None:
        super().__init__(card.mean, card.std)
        self.project = nn.Conv2d(3, dim, card.patch_px, stride=card.patch_px)
        self.levels = (Level(index=0, dim=card.dim, stride_px=card.patch_px),)
        self.tile_multiple_px = card.patch_px

    def maps(self, x_BCHW: Tensor, indices: tuple[int, ...]) -> list[Tensor]:
        return [self.project(x_BCHW) for _ in indices]


def filled(net: Backbone, state: dict[str, Tensor] | None) -> Backbone:
    """The weights of the file, or, without one, the same random ones each time."""
    if state is not None:
        net.load_state_dict(state)
    return net


def build(card, state, kind=Patches, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return filled(kind(card, **options), state)


class _Scrambled(Patches):
    def maps(self, x_BCHW, indices):
        return [m.transpose(2, 3).reshape(m.shape) for m in super().maps(x_BCHW, indices)]


class _Mirrored(Patches):
    def maps(self, x_BCHW, indices):
        return [m.flip(3) for m in super().maps(x_BCHW, indices)]


class _Centred(Patches):
    def maps(self, x_BCHW, indices):
        return [m - 0.5 * m.mean(0) for m in super().maps(x_BCHW, indices)]


class _Learning(Patches):
    def freeze(self):
        return self.train()


class _Training(Patches):
    def train(self, mode=True):
        return nn.Module.train(self, mode)


class _Half(Patches):
    def maps(self, x_BCHW, indices):
        return [m.bfloat16() for m in super().maps(x_BCHW, indices)]


class _Narrow(Patches):
    def maps(self, x_BCHW, indices):
        return [m[:, :20] for m in super().maps(x_BCHW, indices)]


class _OneTooMany(Patches):
    def maps(self, x_BCHW, indices):
        return [*super().maps(x_BCHW, indices), x_BCHW]


def sound(card, state): return build(card, state)
def scrambled(card, state): return build(card, state, _Scrambled)
def mirrored(card, state): return build(card, state, _Mirrored)
def centred(card, state): return build(card, state, _Centred)
def learning(card, state): return build(card, state, _Learning)
def training(card, state): return build(card, state, _Training)
def half(card, state): return build(card, state, _Half)
def narrow(card, state): return build(card, state, _Narrow)
def one_too_many(card, state): return build(card, state, _OneTooMany)
def drawn_anew(card, state): return filled(Patches(card), state)
def raises(card, state): raise ZeroDivisionError("no patches")
'''


def head(folder: Path, name: str = "Sound", levels: int = 2, pixels: bool = False, more: str = "") -> Path:
    """Writes ``heads/my-head.toml`` and its code; gives the registry folder."""
    (folder / "heads").mkdir(parents=True, exist_ok=True)
    card = HEAD_CARD.format(name=name, levels=levels, pixels=str(pixels).lower(), more=more)
    (folder / "heads" / "my-head.toml").write_text(card, encoding="utf-8")
    (folder / "heads" / "my_head.py").write_text(HEADS, encoding="utf-8")
    return folder


def backbone(folder: Path, name: str = "sound", weights: str = "none", depth: int = 1, params_m: float = 0.0046) -> Path:
    """Writes ``backbones/my-backbone.toml`` and its code; gives the registry folder."""
    (folder / "backbones").mkdir(parents=True, exist_ok=True)
    card = BACKBONE_CARD.format(name=name, weights=weights, depth=depth, params_m=params_m)
    (folder / "backbones" / "my-backbone.toml").write_text(card, encoding="utf-8")
    (folder / "backbones" / "my_backbone.py").write_text(BACKBONES, encoding="utf-8")
    return folder
