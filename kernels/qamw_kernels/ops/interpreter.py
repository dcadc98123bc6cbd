"""Whether Triton's interpreter stands in for its compiler, asked without importing Triton."""

import os


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET`` is set, read as Triton reads it.

    Triton decides for its kernels when they are imported: set the variable before that.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
