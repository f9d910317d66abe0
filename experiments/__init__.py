"""How our own figures were made: README.md says what each experiment does and where its figures are used."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
