"""`python -m lorelay`: the same as the `lorelay` command."""

import sys

from lorelay.main import main

sys.exit(main())
