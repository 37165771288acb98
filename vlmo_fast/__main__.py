"""`python -m vlmo_fast` is the command `vlmo-fast`."""

import sys

from vlmo_fast.cli import main

sys.exit(main())
