"""What transformers reads images with, in an environment with PyTorch's CPU build.

The wheels of torchvision are made for PyTorch with CUDA: beside the CPU build, their operators
cannot be loaded. Processors of images call none of them, only the Python code. So it lies outside
of the environment, where no test but those of the architectures sees it.
"""

import importlib
import sys
from pathlib import Path

TORCHVISION = Path(__file__).resolve().parents[2] / "build" / "torchvision"
"""Where ``make test-architectures`` puts it."""


def import_torchvision(directory: Path = TORCHVISION) -> None:
    """Import torchvision from a directory, without its operators; nothing where it is not there.

    Raises:
        ImportError: it is another version than this PyTorch needs.
    """
    if not directory.exists() or "torchvision" in sys.modules:
        return
    import torch

    sys.path.insert(0, str(directory))
    declared = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):  # those of which its Python code registers something
        declared.define(f"{operator}(Tensor boxes) -> Tensor")
    # The operators are there as long as this is.
    importlib.import_module("torchvision").declared_operators = declared  # type: ignore[attr-defined]
