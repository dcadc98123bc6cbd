"""``python -m tools.lm_heads``: list the heads that the installed vLLM cannot serve quantized.

The list is shipped with the quantizer, which uses it where vLLM is not installed. A test compares.
"""

import json

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from offline_quantize.planning.served_heads import UNSERVED_HEADS, installed_vllm, unserved_heads


def main() -> None:
    """Write the list anew."""
    sources = installed_vllm()
    if sources is None:
        raise SystemExit("vLLM is not installed: its sources are what the list is made of")
    heads = unserved_heads(sources, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    UNSERVED_HEADS.write_text(json.dumps(heads, indent=2) + "\n")
    print(f"{UNSERVED_HEADS}: {len(heads)} architectures")


if __name__ == "__main__":
    main()
