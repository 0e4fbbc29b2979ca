"""``python -m kvgds``: the command line."""

from __future__ import annotations

from kvgds.cli import main

main()
