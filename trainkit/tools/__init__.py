"""The verbs behind scripts/: `main(argv)` and --help each. No verb imports another one."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "assets"
