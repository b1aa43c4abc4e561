"""How much memory a model takes: computed for a device that need not be there."""

from lavis_kvmod.memory.estimate import MemoryEstimate, estimate

__all__ = ["MemoryEstimate", "estimate"]
