"""The verbs behind scripts/ and lora-tools: `main(argv)` and --help each. No verb imports another one."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "assets"  # of a clone; the installed package leaves these 40 MB out
