"""python -m amber is amber-run."""

import sys

from .cli import main

sys.exit(main())
