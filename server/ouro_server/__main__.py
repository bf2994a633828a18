"""`python -m ouro_server` is `ouro-serve`."""

import sys

from ouro_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
