"""LoRA files, and the only code that reads and writes them.

file.py · LoraFile: read and write any layout; header.py · names, shapes and metadata; parts.py · what the tensors of a
module say; layouts.py · how each layout says it; layer.py · the update of a module, DoRA's magnitudes;
metadata.py · how much a header says; contents.py · what the tensors of a file are;
rounding.py · whether a file holds what it should;
spectrum.py · how large an update is, and the best one of a smaller rank; programs.py · which programs load a file;
base_weights.py · a base's weights.
"""

from trainkit.lora_file.base_weights import BaseWeights
from trainkit.lora_file.file import CROSS, WIDTHS, LoraFile, Weights, released_names
from trainkit.lora_file.header import Header, read_header
from trainkit.lora_file.layer import LayerUpdate, Magnitude
from trainkit.lora_file.layouts import DORA_NORM, Layout
from trainkit.lora_file.metadata import BASES, MetadataLevel, hash_metadata, kept, network_of
from trainkit.lora_file.programs import loaded_by

__all__ = ["BASES", "CROSS", "DORA_NORM", "WIDTHS", "BaseWeights", "Header", "LayerUpdate", "Layout", "LoraFile",
           "Magnitude", "MetadataLevel", "Weights", "hash_metadata", "kept", "loaded_by", "network_of", "read_header",
           "released_names"]
