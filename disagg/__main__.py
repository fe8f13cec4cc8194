"""``python -m disagg``."""

from disagg.cli import main

main()
