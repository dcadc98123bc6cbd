"""Which tensors a model wants of its checkpoint."""

import re
from collections.abc import Iterable
from typing import Any

from offline_quantize.model.empty import decoder_layers


def unwanted(model: Any, stored: Iterable[str]) -> tuple[str, ...]:
    """Names of tensors that are nothing of the model's, except those transformers leaves out too.

    So it does with old buffers, and with layers behind the last that predict further tokens.

    Args:
        model: of transformers.
        stored: names of the parameters and buffers that the checkpoint has tensors of.
    """
    layers_name, layers = decoder_layers(model)
    patterns = [
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq$",
        r"(^|\.)position_ids$",
    ]
    wanted = set(model.state_dict())

    def left_out(name: str) -> bool:
        layer = re.match(rf"{re.escape(layers_name)}\.(\d+)\.", name)
        behind = layer is not None and int(layer[1]) >= len(layers)
        return behind or any(re.search(pattern, name) for pattern in patterns)

    return tuple(name for name in sorted(stored) if name not in wanted and not left_out(name))
