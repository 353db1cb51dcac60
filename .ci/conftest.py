"""The fixtures of test_voxtral.py, for the tests of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_voxtral import checkpoint, digits, loaded, noise  # noqa: F401
