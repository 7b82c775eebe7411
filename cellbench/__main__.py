"""``python -m cellbench COMMAND``: the command line, see :mod:`cellbench.cli.main`."""

import sys

from cellbench.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
