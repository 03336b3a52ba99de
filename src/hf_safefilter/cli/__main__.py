"""`python -m hf_safefilter.cli`."""

import sys

from . import main

sys.exit(main())
