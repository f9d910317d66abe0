"""Memory planned before a run: how much of a card each phase needs, and which flags make it fit.

    live_bytes.py       bytes of live tensors by kind, and FLOPs
    as_on_cuda.py       the meta device with the attention kernels and the autocast of a card
    models.py           configs of a model folder, or built-in sizes of SD 1.5, 2.1 and SDXL
    skeleton.py         the family of those configs, without numbers
    optimizer_state.py  what the optimizer keeps
    phases.py           the phases of a run, traced
    need.py             from the peak to what a card must have free

Nothing is measured on a card: docs/memory.md says what was.
"""
