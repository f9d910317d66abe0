"""What other programs make of the tensors of one module and the base's weight, written from their documented behaviour.

None of trainkit's reader is used. Every function takes the parts of a module by the ends of their names, and W in the
base's shape; it returns the weight that the program would use at strength 1.
Source: Comfy-Org/ComfyUI a125cd8, comfy/weight_adapter; KohakuBlueleaf/LyCORIS f49d30d, lycoris/modules;
AUTOMATIC1111/stable-diffusion-webui, extensions-builtin/Lora; invoke-ai/InvokeAI, invokeai/backend/patches/layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]


def product(parts: Parts) -> tuple[Tensor, int | None]:
    """The update without its scale, a kernel in a row -> it, and the rank that alpha is divided by."""
    if "lora_up.weight" in parts:
        up, down = parts["lora_up.weight"].flatten(1), parts["lora_down.weight"].flatten(1)
        return up @ down, len(down)
    if "hada_w1_a" in parts:
        first, second = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in (1, 2))
        return first * second, len(parts["hada_w1_b"])
    if "lokr_w1" in parts:
        rank = len(parts["lokr_w2_b"]) if "lokr_w2_b" in parts else None
        block = parts["lokr_w2"].flatten(1) if rank is None else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        return torch.kron(parts["lokr_w1"], block), rank
    return parts["diff"].flatten(1), None


def scale_of(parts: Parts, rank: int | None) -> float:
    return float(parts["alpha"]) / rank if "alpha" in parts and rank is not None else 1.0


def comfyui(W: Tensor, parts: Parts) -> Tensor:
    """Forge, too. A magnitude for each output is divided by the norm of the base's row."""
    delta, rank = product(parts)
    V = W.flatten(1) + delta * scale_of(parts, rank)
    if "dora_scale" in parts:
        dora = parts["dora_scale"]
        if dora.shape[0] == len(W):
            V = V * dora.view(-1, 1) / W.flatten(1).norm(dim=1, keepdim=True)
        else:
            V = V * (dora / by_input_norm(V.view(W.shape))).expand(W.shape).reshape(V.shape)
    return V.view(W.shape)


def lycoris(W: Tensor, parts: Parts) -> Tensor:
    """The merge. LoHa and LoKr apply their scale when the product is made and when it is merged."""
    delta, rank = product(parts)
    scale = scale_of(parts, rank)
    if "hada_w1_a" in parts or "lokr_w1" in parts:
        scale = scale**2
    if "lokr_w1" in parts:
        factors_have_lycoris_order(W, parts)
    V = W.flatten(1) + delta * scale
    if "dora_scale" in parts:
        V = V * parts["dora_scale"].view(-1, 1) / V.norm(dim=1, keepdim=True)
    return V.view(W.shape)


def factors_have_lycoris_order(W: Tensor, parts: Parts) -> None:
    """A module is built with the smaller factor first, and the file's tensors are copied into it."""
    small = parts["lokr_w1"].shape
    assert small[0] <= len(W) // small[0] and small[1] <= W.shape[1] // small[1], "LyCORIS cannot load this pair"


def a1111(W: Tensor, parts: Parts) -> Tensor:
    """One magnitude for each input is all it knows, and the scale is applied to the whole update."""
    delta, rank = product(parts)
    update = delta.view(W.shape)
    if "dora_scale" in parts:
        V = W + update
        update = V * (parts["dora_scale"] / by_input_norm(V)) - W
    return W + update * scale_of(parts, rank)


def invokeai(W: Tensor, parts: Parts) -> Tensor:
    """A file's dora_scale belongs to inputs."""
    delta, rank = product(parts)
    V = W + (delta * scale_of(parts, rank)).view(W.shape)
    return V * (parts["dora_scale"] / by_input_norm(V)) if "dora_scale" in parts else V


def by_input_norm(V: Tensor) -> Tensor:
    """‖V‖ over outputs and kernel -> [1,in] or [1,in,1,1]"""
    return V.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *[1] * (V.ndim - 2))


LOADERS: dict[str, Callable[[Tensor, Parts], Tensor]] = {
    "ComfyUI": comfyui, "LyCORIS": lycoris, "A1111": a1111, "InvokeAI": invokeai}
