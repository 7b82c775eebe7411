"""Images with masks: reading, splitting, checking, transforming and drawing them."""
