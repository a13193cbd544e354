"""`python -m imex_persist` is `imex-persist`."""

import sys

from imex_persist.cli import main

sys.exit(main())
