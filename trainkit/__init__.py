"""The parts of the trainer suite. CONTRIBUTING.md has the source tree and the import order. Nothing is re-exported."""

__version__ = "0.1.0"  # as in pyproject.toml
