"""Waiting for a device, whatever its backend's function takes."""

from __future__ import annotations

import inspect

import torch


def synchronize(device: torch.device) -> None:
    """Wait until everything that is queued on `device` is done; the CPU queues nothing.

    `torch.cuda.synchronize` takes the device. `torch.mps.synchronize` takes no argument, as there is one Apple GPU.
    """
    if device.type == "cpu":
        return
    wait = torch.get_device_module(device).synchronize
    if inspect.signature(wait).parameters:
        wait(device)
    else:
        wait()
