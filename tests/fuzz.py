"""How much is generated: `scripts/fuzz` makes more of it than a test run."""

from __future__ import annotations

import os

TIMES = int(os.environ.get("DISAGG_FUZZ", "1"))
