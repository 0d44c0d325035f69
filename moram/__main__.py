"""`python -m moram` is the command `moram`."""

import sys

from .cli import main

sys.exit(main())
