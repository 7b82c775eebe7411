"""What people and tools add to the name of an image for the files that belong to it."""

from __future__ import annotations

import re

MASK_WORDS = re.compile(r"[-_. ](?:cp_)?(?:masks?|segs?|segmentations?|labels?|annotations?|gt)$", re.IGNORECASE)
"""What tools append to the name of an image for its mask: ``a_mask.png``, ``a-seg.tif``, Cellpose's ``a_cp_masks.png``."""
IMAGE_WORDS = re.compile(r"[-_. ](?:img|images?|raw|original)$", re.IGNORECASE)
ANNOTATED = re.compile(r"[-_. ]+(?:segs?|rois?|roiset|annotations?|masks?|labels?|cells|outlines?)$", re.IGNORECASE)
"""What tools append to the name of an image for its outlines: ``a_seg.npy``, ``a_rois.zip``."""
ADDED = re.compile(
    r"[-_. ]+(?:cp_)?(?:masks?|segs?|segmentations?|labels?|annotations?|gt|instances?|rois?|roiset|regions?|predictions?|pred|outlines?|cells)$",
    re.IGNORECASE,
)
"""What tools append to the name of an image for its mask: ``a_seg.npy``, ``a_cp_masks.tif``, ``a_rois.zip``, ``a.instances.png``."""
BEFORE = re.compile(r"^(?:masks?|labels?|roiset|rois?|seg|pred)[-_. ]", re.IGNORECASE)
NO_MASKS = re.compile(r"[-_.](?:overlay|probability|flows?|cp_output|cellprob)$|\.regions$", re.IGNORECASE)
"""Files that tools write beside masks; `predict` keeps ``NAME.regions.geojson`` there."""
