"""cellbench: which frozen foundation model, with which segmentation head, outlines your cells best, and is the difference real?"""

__version__ = "0.2.0"
