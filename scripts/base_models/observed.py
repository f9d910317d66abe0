"""What a person saw in the sheets and must know before using the models: the words of the cards."""

OBSERVED: dict[str, dict[str, str]] = {"clip": {}, "sdxl": {}, "sd": {}}
