"""Which programs load a file as it is meant, by their own source code: see docs/adapters.md, "What loads where".

Source: Comfy-Org/ComfyUI, comfy/lora.py and comfy/weight_adapter; AUTOMATIC1111/stable-diffusion-webui,
extensions-builtin/Lora; invoke-ai/InvokeAI, invokeai/backend/patches; KohakuBlueleaf/LyCORIS, lycoris/modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainkit.adapters.updates import Hadamard, Kronecker, LowRank

if TYPE_CHECKING:
    from trainkit.lora_file.file import LoraFile

WEBUIS, BY_INPUT = ("A1111", "InvokeAI"), ("ComfyUI, Forge", "A1111", "InvokeAI")
PROGRAMS = ("Diffusers", *BY_INPUT, "LyCORIS")
YES = ""


def loaded_by(found: LoraFile) -> dict[str, str]:
    """Program -> "" where it uses the file as it is meant, else why not."""
    if found.layout in ("diffusers", "peft"):
        return other_names(found)
    updates = [layer.update for layer in found.layers.values()]
    reasons = dict.fromkeys(PROGRAMS, YES)
    if any(not isinstance(update, LowRank) for update in updates):
        reasons["Diffusers"] = "it reads no LoHa, LoKr or full layers with these names"
    if any(isinstance(update, (Hadamard, Kronecker)) and abs(update.scale - 1) > 1e-6 for update in updates):
        reasons["LyCORIS"] = "its merge applies alpha / rank twice to LoHa and LoKr"
    return reasons | dora_reasons(found)


def other_names(found: LoraFile) -> dict[str, str]:
    why = "it does not know Diffusers' names" if found.layout == "diffusers" else "it does not know PEFT's names"
    return dict.fromkeys(PROGRAMS, why) | ({"Diffusers": YES} if found.layout == "diffusers" else {})


def dora_reasons(found: LoraFile) -> dict[str, str]:
    """What a DoRA's magnitudes are in each program."""
    held = next((layer.magnitude for layer in found.layers.values() if layer.magnitude is not None), None)
    if held is None:
        return {}
    reasons = {"Diffusers": "it drops magnitudes with these names"}
    if held.by_input:
        return reasons
    reasons |= dict.fromkeys(WEBUIS, "it knows only a magnitude for each input")
    if held.over_base:
        return reasons | {"LyCORIS": "the magnitudes are for ComfyUI's formula"}
    return reasons | {"ComfyUI, Forge": "it divides by the norm of the base's weight, and the update is too strong"}
