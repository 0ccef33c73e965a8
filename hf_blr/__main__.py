"""`python -m hf_blr` is `hf-blr`."""

import sys

from hf_blr.cli import main

sys.exit(main())
