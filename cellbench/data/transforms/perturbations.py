"""Perturbed test images: stain, brightness, blur, noise, JPEG and scale, each at three strengths, to measure how far a model's scores fall.

A perturbation depends on the data seed and the image's name only: neither on the model nor on the other images. Where it has a direction (darker or
brighter, smaller or larger), the direction is drawn once for an image and is the same at every strength.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np

from cellbench.config.experiment import UNCHANGED
from cellbench.data.dataset import Dataset, Sample

VERSION = 1
"""Increased when a perturbation changes; finished runs are then tested again."""


@dataclass(frozen=True)
class Perturbation:
    """One perturbation at one strength, 1 to 3."""

    kind: str
    strength: int

    @property
    def name(self) -> str:
        """``blur-2``; ``none`` for the unchanged images."""
        return self.kind if self.kind == UNCHANGED else f"{self.kind}-{self.strength}"

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The perturbed image (H, W, 3) uint8; of another size with ``scale``."""
        return image if self.kind == UNCHANGED else _APPLY[self.kind](image, _STRENGTHS[self.kind][self.strength - 1], rng)


def perturbations(kinds: tuple[str, ...]) -> list[Perturbation]:
    """The unchanged images, then each kind at its three strengths; empty without kinds."""
    return [Perturbation(UNCHANGED, 0), *(Perturbation(kind, k) for kind in kinds for k in (1, 2, 3))] if kinds else []


@dataclass(frozen=True, kw_only=True)
class PerturbedDataset(Dataset):
    """A dataset whose images are perturbed as they are read."""

    perturbation: Perturbation
    seed: int

    @classmethod
    def of(cls, dataset: Dataset, perturbation: Perturbation, seed: int) -> PerturbedDataset:
        """The test images of ``dataset``, perturbed. ``seed``: a run's ``data_seed``."""
        plain = cls(**{**vars(dataset), "train": (), "val": (), "further": ()}, perturbation=perturbation, seed=seed)
        return replace(plain, test=tuple(replace(sample, size_px=plain._size_px(sample)) for sample in dataset.test))

    def read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        image, classes = super().read(sample)
        image = self.perturbation(image, self._rng(sample))
        if classes.shape != image.shape[:2]:
            classes = cv2.resize(classes, image.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        return image, classes

    def _rng(self, sample: Sample) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(sample.name.encode()), zlib.crc32(self.perturbation.kind.encode())])

    def _size_px(self, sample: Sample) -> tuple[int, int]:
        if self.perturbation.kind != "scale":
            return sample.size_px
        return _scaled_px(sample.size_px, _STRENGTHS["scale"][self.perturbation.strength - 1], self._rng(sample))


def _stain(image: np.ndarray, reach: float, rng: np.random.Generator) -> np.ndarray:
    """Each of haematoxylin, eosin and DAB is multiplied by 1 - ``reach`` or 1 + ``reach``."""
    import torch

    from cellbench.data.transforms.augmentation import StainJitter

    factors = 1 + reach * rng.choice([-1.0, 1.0], 3)
    pixels_1CHW = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255
    changed = StainJitter().apply(pixels_1CHW, [(*factors.tolist(), 0.0, 0.0, 0.0)])[0]
    return (changed * 255).round_().byte().permute(1, 2, 0).contiguous().numpy()


def _brightness(image: np.ndarray, reach: float, rng: np.random.Generator) -> np.ndarray:
    """Darker or brighter by this share; too bright is white."""
    return _bytes(image * np.float32(1 + reach * rng.choice([-1.0, 1.0])))


def _blur(image: np.ndarray, sigma_px: float, rng: np.random.Generator) -> np.ndarray:
    """Out of focus: Gaussian."""
    return cv2.GaussianBlur(image, (0, 0), sigma_px)


def _noise(image: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of this deviation in grey levels, independent by pixel and channel."""
    return _bytes(image + rng.standard_normal(image.shape, np.float32) * np.float32(deviation))


def _jpeg(image: np.ndarray, quality: float, rng: np.random.Generator) -> np.ndarray:
    """Saved as JPEG with this quality, and read again."""
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    return cv2.cvtColor(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8), cv2.COLOR_BGR2RGB)


def _scale(image: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Another magnification: the image and its cells, smaller or larger by this factor."""
    height, width = _scaled_px(image.shape[:2], factor, rng)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR)


def _scaled_px(size_px: tuple[int, int], factor: float, rng: np.random.Generator) -> tuple[int, int]:
    share = factor if rng.integers(2) else 1 / factor
    return max(1, round(size_px[0] * share)), max(1, round(size_px[1] * share))


def _bytes(levels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


_APPLY: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "stain": _stain,
    "brightness": _brightness,
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "scale": _scale,
}
_STRENGTHS = {
    "stain": (0.15, 0.3, 0.5),
    "brightness": (0.15, 0.3, 0.45),
    "blur": (1.0, 2.0, 4.0),
    "noise": (8.0, 16.0, 32.0),
    "jpeg": (50, 20, 8),
    "scale": (1.2, 1.4, 1.7),
}
