"""Reads the metadata of an image file: the range of its values, and the size of a pixel in micrometres.

Sources: TIFF 6.0 (tags 280-283, 296, 340, 341), the OME-XML schema (Pixels), ImageJ's and Aperio's descriptions, PNG 1.2 (pHYs, sBIT).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cellbench.data.io.decode import OpenImage

_UM = {"": 1.0, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "micrometre": 1.0, "\\u00b5m": 1.0,
       "pm": 1e-6, "å": 1e-4, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "dm": 1e5, "m": 1e6, "inch": 25400.0, "in": 25400.0}  # fmt: skip
COARSEST_UM = 10.0
"""Resolution tags above are those of screens, print and scanners (72 dpi are 353 um, 2400 dpi 10.6 um) or mean "unknown": not used."""
_FINEST_UM, _WIDEST_UM = 1e-4, 1e4
SAME = 0.01
"""Pixel sizes that differ by less are the same: tags are rounded."""


@dataclass(frozen=True, kw_only=True)
class PixelSize:
    """Size of one pixel in micrometres, as the file states it, upright."""

    height_um: float
    width_um: float
    contradicted: str = ""
    """Another size that the same file states, as text."""

    @property
    def side_um(self) -> float:
        """The side of a square of the same area."""
        return math.sqrt(self.height_um * self.width_um)

    @property
    def square(self) -> bool:
        return math.isclose(self.height_um, self.width_um, rel_tol=SAME)

    def __str__(self) -> str:
        return f"{self.width_um:.4g}" if self.square else f"{self.width_um:.4g} x {self.height_um:.4g}"


def same_size(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=SAME)


def pixel_size(picture: OpenImage) -> PixelSize | None:
    """The first size of OME-XML, description and resolution tags; None without one that a microscope could have."""
    stated = _of_tiff(picture.page) if picture.page is not None else _of_info(picture.info)
    if not stated:
        return None
    where, height, width = stated[0]
    other = next(
        (f"{source} {w:.4g}, {where} {width:.4g}" for source, h, w in stated[1:] if not (same_size(h, height) and same_size(w, width))), ""
    )
    if picture.turn in (5, 6, 7, 8):
        height, width = width, height
    return PixelSize(height_um=height, width_um=width, contradicted=other)


def _of_tiff(page: Any) -> list[tuple[str, float, float]]:
    tags = page.tags
    text = _description(page)
    found: list[tuple[str, float, float]] = []
    pixels = _ome_pixels(text)
    if pixels:
        sizes: list[float] = []
        for axis in "YX" if "PhysicalSizeY" in pixels else "XX":
            unit = _UM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm").strip().lower())
            sizes.append(_number(pixels.get(f"PhysicalSize{axis}")) * unit if unit else math.nan)
        found.append(("OME-XML", sizes[0], sizes[1]))
    across, down, unit = (_ratio(tags.valueof(282)), _ratio(tags.valueof(283)), tags.valueof(296, 2))
    if text.startswith("ImageJ="):
        named = re.search(r"^unit=(.*)$", text, re.MULTILINE)
        scale = _UM.get(named[1].strip().lower()) if named and named[1].strip() else None
        if scale and across > 0 and down > 0:
            # Inches and centimetres come from a resolution for print.
            found.append(("ImageJ" if scale <= 1e3 else "resolution", scale / down, scale / across))
    elif (aperio := re.search(r"\|\s*MPP\s*=\s*([\d.]+)", text)) is not None:
        found.append(("MPP", _number(aperio[1]), _number(aperio[1])))
    side = {2: 25400.0, 3: 1e4, 4: 1e3, 5: 1.0}.get(unit)  # inch, centimetre; millimetre and micrometre beyond TIFF 6.0
    if side and across > 0 and down > 0:
        found.append(("resolution tags", side / down, side / across))
    return [one for one in found if _believable(*one)]


def _of_info(info: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    dpi: Any = info.get("dpi")
    try:
        across, down = (float(part) for part in dpi)  # PNG pHYs, JFIF, EXIF, BMP, JPEG 2000
    except (TypeError, ValueError, ZeroDivisionError):
        return []
    if not (across > 0 and down > 0):
        return []
    found = ("resolution", 25400.0 / down, 25400.0 / across)
    return [found] if _believable(*found) else []


def _believable(where: str, height: float, width: float) -> bool:
    most = COARSEST_UM if where.startswith("resolution") else _WIDEST_UM
    return all(_FINEST_UM < side < most for side in (height, width))  # nan is not


def stated_range(picture: OpenImage) -> tuple[float, float] | None:
    """Black and white that a file of more than 8 bits states; None if it states no more than its dtype."""
    if picture.page is None:
        bits = picture.bits or 16
        return (0.0, 2.0**bits - 1) if 8 < bits < 16 else None
    page: Any = picture.page
    if page.dtype is not None and page.dtype.kind == "f":
        low, high = (_number(_first(page.tags.valueof(tag))) for tag in (340, 341))
        return (low, high) if low < high and math.isfinite(high - low) else None
    for depth in (_number(_ome_pixels(_description(page)).get("SignificantBits")), page.bitspersample):
        if 8 < depth < 16:
            return _from_black(page, 2.0**depth - 1)
    full = 2.0**page.bitspersample - 1
    for tag in (341, 281):
        high = _number(_first(page.tags.valueof(tag)))
        # Writers use the dtype's maximum if they do not know the range.
        if 255 <= high < full:
            return _from_black(page, high)
    return None


def _from_black(page: Any, high: float) -> tuple[float, float]:
    """Black and white where ``high`` is the largest value; an image that counts from white is inverted within 16 bits when decoded."""
    return (65535 - high, 65535.0) if page.photometric == 0 else (0.0, high)


def _description(page: Any) -> str:
    text = page.tags.valueof(270, "")
    return text if isinstance(text, str) else ""


def _ome_pixels(text: str) -> dict[str, str]:
    """The attributes of the first Pixels element of OME-XML; empty for other text."""
    if "<OME" not in text[:2000] and ":OME" not in text[:2000]:
        return {}
    element = re.search(r"<(?:\w+:)?Pixels\b([^>]*)>", text)
    return dict(re.findall(r"(\w+)\s*=\s*[\"']([^\"']*)[\"']", element[1])) if element else {}


def _ratio(value: Any) -> float:
    if isinstance(value, tuple) and len(value) == 2:
        return value[0] / value[1] if value[1] else math.nan
    return _number(value)


def _first(value: Any) -> Any:
    return max(value) if isinstance(value, tuple) and value else value


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
