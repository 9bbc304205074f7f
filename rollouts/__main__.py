"""``python -m rollouts``, and so also ``torchrun -m rollouts``."""

import sys

from rollouts.cli.main import main

sys.exit(main())
