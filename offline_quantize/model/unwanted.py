"""Which tensors of its checkpoint a model does not use."""

import re
from typing import Any

from offline_quantize.model.empty import decoder_layers
from offline_quantize.model.tensor_map import TensorMap


def unwanted(model: Any, tensor_map: TensorMap) -> tuple[str, ...]:
    """Names of tensors that the model does not use, except those that transformers also skips.

    It skips old buffers, and the layers after the last one that predict further tokens, whose
    number is in config.json.
    """
    further = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    layers_name, layers = decoder_layers(model)
    patterns = [
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq$",
        r"(^|\.)position_ids$",
        r"\.attn\.(masked_)?bias$",  # masks of GPT-2 and GPT-J, which vLLM skips too
    ]

    def left_out(name: str) -> bool:
        layer = re.match(rf"{re.escape(layers_name)}\.(\d+)\.", name)
        behind = layer is not None and 0 <= int(layer[1]) - len(layers) < further
        return behind or any(re.search(pattern, name) for pattern in patterns)

    return tuple(
        name
        for name, sought in tensor_map.unmatched.items()
        if not (left_out(name) or left_out(sought))
    )
