"""The records of what is read back for inference: an exported folder's ``run.json``, and a run's artifacts in MLflow.

Each is checked as a whole by its record, and a fault in it is one line: these files may come from anybody.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, model_validator

from cellbench.config.base import StrictModel
from cellbench.config.run import RunSpec
from cellbench.data.transforms.preprocessing import Preparation
from cellbench.data.transforms.stain import KINDS
from cellbench.errors import CellbenchError, one_line
from cellbench.metrics.calibration import Calibration
from cellbench.metrics.separation import METHODS, SeparationParams, tried_settings
from cellbench.metrics.training_features import TrainingFeatures
from cellbench.reporting.stored_records import SplitSizes

Share = Annotated[float, Field(ge=0, le=1)]


class StoredRecord(StrictModel):
    """A record that this package has written. Keys of a newer version are ignored."""

    model_config = ConfigDict(extra="ignore")


class FramingRecord(StoredRecord):
    kind: Literal["tile", "pad", "resize"]
    side_px: int = Field(ge=1, le=65536)
    scale: float = Field(default=1.0, gt=0, le=64)


class ReadingRecord(StoredRecord):
    int_range: tuple[float, float] | None = None
    float_range: tuple[float, float] | None = None
    channels: tuple[Annotated[int, Field(ge=0, lt=64)], ...] = ()

    @model_validator(mode="after")
    def _white_is_above_black(self) -> ReadingRecord:
        if any(pair is not None and not pair[0] < pair[1] for pair in (self.int_range, self.float_range)):
            raise ValueError("a range is [BLACK, WHITE], and white is above black")
        if len(self.channels) not in (0, 1, 3):
            raise ValueError("channels are one or three")
        return self


class PreparationRecord(StoredRecord):
    """Of ``Preparation.to_dict``."""

    framing: FramingRecord
    normalise: str | None = None
    normaliser: dict[str, Any] | None = None
    reading: ReadingRecord | None = None
    um_per_px: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _normaliser_is_of_its_kind(self) -> PreparationRecord:
        if self.normalise is not None:
            if self.normalise not in KINDS:
                raise ValueError(f"normalise = {self.normalise!r:.60}, which is none of {', '.join(KINDS)}")
            TypeAdapter(KINDS[self.normalise]).validate_python(self.normaliser)  # also finds missing and unknown fields
        return self

    def preparation(self) -> Preparation:
        return Preparation.of(self.model_dump())


class SeparationRecord(StoredRecord):
    """Of ``SeparationParams``."""

    saddle_ratio: Share = 0.0
    method: str = SeparationParams.method
    settings: dict[str, float] = Field(default_factory=dict)
    val_ap50: dict[str, float | None] = Field(default_factory=dict)
    num_images: int = Field(default=0, ge=0)
    min_area_px: int = Field(default=SeparationParams.min_area_px, ge=1)
    learned: bool = False
    owners: tuple[Annotated[int, Field(ge=0, lt=256)], ...] = ()

    @model_validator(mode="after")
    def _settings_are_of_the_method(self) -> SeparationRecord:
        if self.method not in METHODS:
            raise ValueError(f"method = {self.method!r:.60}, which is none of {', '.join(METHODS)}")
        if self.method != "watershed" and self.settings.keys() != tried_settings(self.method)[0].keys():
            raise ValueError(f"the settings of {self.method} are {', '.join(tried_settings(self.method)[0])}")
        return self

    def separation(self) -> SeparationParams:
        return SeparationParams(**self.model_dump())


class CalibrationRecord(StoredRecord):
    """Of ``Calibration``."""

    temperature: float = Field(default=1.0, gt=0, le=100)
    dice_shift: float = Field(default=0.0, ge=-1, le=1)
    dice_error: Share | None = None
    own_share: Share = 0.0
    edge_share: Share = 0.0

    def calibration(self) -> Calibration:
        return Calibration(**self.model_dump())


SeenImage = tuple[str, str, Annotated[str, Field(pattern="^[0-9a-f]{16}$")], Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
"""Name, path, digest of the pixels and perceptual hash of an image."""


class SeenRecord(StoredRecord):
    """Of ``data.audit.seen_images``."""

    format: Literal[1]
    train: tuple[SeenImage, ...]
    val: tuple[SeenImage, ...]


class ScoresRecord(StoredRecord):
    """What inference reads of a run's ``per_image.json``."""

    classes: tuple[str, ...] = Field(min_length=2, max_length=255)
    dataset: str
    images: tuple[str, ...]
    num_images: SplitSizes | None = None
    fold: int | None = None
    num_folds: int | None = None


def training_features_of_arrays(arrays: dict[str, Any], where: str) -> TrainingFeatures:
    """How training images look, from the arrays of a file. Raises CellbenchError for others."""
    try:
        return TrainingFeatures.from_arrays(arrays)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise CellbenchError(f"{where}: is damaged ({type(error).__name__}: {one_line(error)[:80]}).") from None


class FormatRecord(StoredRecord):
    format: Any = None


class ExportRecord(StoredRecord):
    """An exported folder's ``run.json``."""

    name: str
    run: RunSpec
    classes: tuple[str, ...] = Field(min_length=2, max_length=255)
    preparation: PreparationRecord
    separation: SeparationRecord
    calibration: CalibrationRecord = CalibrationRecord()
    fingerprint: str
    dataset_digest: str
    backbone_digest: str = ""
    run_id: str
    experiment: str
    config: str
    data: str = ""
    chosen: str = ""
    seen: SeenRecord | None = None

    @model_validator(mode="after")
    def _owners_are_classes(self) -> ExportRecord:
        owners = self.separation.owners
        if owners and (len(owners) != len(self.classes) or max(owners) >= len(self.classes)):
            raise ValueError("separation.owners does not name a class for each of the classes")
        return self
