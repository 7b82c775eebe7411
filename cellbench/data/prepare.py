"""What is done to a decoded image before it is cut: its framing. One record for training, validation, test and prediction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cellbench.framing import Framing


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """From images to framed images. Equal records do equal things, so that what was prepared can be kept under them."""

    framing: Framing

    @property
    def nothing(self) -> bool:
        """Whether it gives back what it is given."""
        return self.framing.exact

    def image(self, image: np.ndarray) -> np.ndarray:
        """The framed image (H', W', 3) uint8 of an image (H, W, 3) uint8 RGB."""
        return self.framing.image(image)

    def __call__(self, pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """An image and its class map (H, W) uint8, both framed."""
        return self.image(pair[0]), self.framing.mask(pair[1])
