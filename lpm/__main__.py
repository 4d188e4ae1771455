"""`python -m lpm`: the command `lpm` where its script is not on the path."""

import sys

from lpm.cli import main

sys.exit(main())
