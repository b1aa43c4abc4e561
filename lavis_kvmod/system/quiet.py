"""Warnings about which a user can do nothing."""

import warnings

__all__ = ["hide_deprecations"]


def hide_deprecations() -> None:
    """Hide what PyTorch says, on import and at every call, of functions that LAVIS's pinned dependencies use."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|fairscale|timm)\b")
    # The new name is unknown to the older PyTorch that this package allows.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`broadcast_buffers` is deprecated")
