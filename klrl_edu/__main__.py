"""`python -m klrl_edu` is `klrl`."""

import sys

from klrl_edu.experiments.cli import main

sys.exit(main())
