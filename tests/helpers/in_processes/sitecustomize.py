"""Read by each Python that a test starts with this folder on its path; see ``undrawn_processes`` in tests/conftest.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from undrawn import Undrawn

from cellbench import background

background.BackgroundCalls = Undrawn
