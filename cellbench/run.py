"""``python -m cellbench.run COMMAND``, and the script ``cellbench``: the command line, see :mod:`cellbench.cli.main`."""

import sys

from cellbench.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
