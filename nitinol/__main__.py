"""`python -m nitinol` is `nitinol`."""

import sys

from nitinol.cli import main

if __name__ == "__main__":
    sys.exit(main())
