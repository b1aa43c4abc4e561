"""The most memory a process has taken, for both sides of `bench_speed.py`."""

import torch


def peak_gib(device):
    """The most memory since this was last asked: allocated on the GPU, or of the process."""
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak
    with open("/proc/self/status") as status:
        kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    return kib / 2**20
