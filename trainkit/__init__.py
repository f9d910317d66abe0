"""The parts of the trainer suite; the map and the import rule stand in README.md. Nothing is re-exported here."""
