"""Which tensors of a model transformers keeps in float32, whatever dtype the others have."""

import re
from collections.abc import Callable
from typing import Any

import torch


def kept_in_float32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Tells by the name of a parameter or buffer whether ``from_pretrained`` keeps it in float32.

    Args:
        model: of transformers.
        dtype: in which the model is loaded.
    """
    patterns = "|".join(x.replace("*", ".*") for x in model._get_dtype_plan(dtype))
    return lambda name: bool(patterns and re.search(patterns, name))
