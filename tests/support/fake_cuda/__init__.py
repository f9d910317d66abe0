"""A card that is not there: real training code on "cuda" tensors that have shapes, dtypes and devices, and no numbers.

    from tests.support.fake_cuda import hooks; hooks.load()      # before torch is imported, in a process of its own
    with machine() as card:                                      # CPU tensors stay real
        trainer.main()
    card.waits                                                   # where the host waited for the device

hooks.py, hooks.cpp · what lets a CPU-only build of torch run autograd on such tensors
machine.py · the card; memory.py · bytes of live tensors; runs.py · runs of a trainer's main() in forked children
"""
