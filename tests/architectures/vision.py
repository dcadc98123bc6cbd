"""torchvision, with which transformers reads images, beside PyTorch's CPU build.

The wheels of torchvision are made for PyTorch with CUDA: beside the CPU build, their operators
cannot be loaded. Image processors call none of them, only the Python code. So torchvision is
installed outside of the environment, where only the tests of the architectures see it.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

TORCHVISION = Path(__file__).resolve().parents[2] / "build" / "torchvision"
"""Where ``make test-architectures`` puts it."""


def import_torchvision(directory: Path = TORCHVISION) -> None:
    """Import torchvision from a directory, if it is there, without its operators.

    Raises:
        ImportError: it is another version than this PyTorch needs.
    """
    if not directory.exists() or "torchvision" in sys.modules:
        return
    sys.path.insert(0, str(directory))
    declared = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):  # its Python code registers functions for these
        declared.define(f"{operator}(Tensor boxes) -> Tensor")
    # The operators exist as long as this object does.
    importlib.import_module("torchvision").declared_operators = declared  # type: ignore[attr-defined]


def can_read_images() -> bool:
    """Whether torchvision was imported."""
    return "torchvision" in sys.modules


def write_processor(directory: Path, image: dict[str, Any]) -> None:
    """Write the processor of images, and of text with images, beside a tokenizer.

    Args:
        image: an architecture's; names of classes of transformers, and options of its parts.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": image["tokens"]})
    parts = {
        part: getattr(transformers, name)(**image["options"])
        for part, name in image["parts"].items()
    }
    processor = getattr(transformers, image["processor"])
    processor(tokenizer=tokenizer, chat_template=tokenizer.chat_template, **parts).save_pretrained(
        directory
    )


def random_image(width: int = 56) -> Any:
    """A square picture, the same one every time."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (width, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
