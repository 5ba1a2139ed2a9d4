"""``python -m fusedformer``."""

import sys

from fusedformer.cli import main

sys.exit(main())
