"""``python -m tools.served``: list what the installed vLLM serves of quantized models.

The list is shipped with the quantizer, which uses it where vLLM is not installed. A test compares
it with the installed vLLM.
"""

import json

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from offline_quantize.planning.served import SERVED, read_all
from offline_quantize.planning.vllm_sources import installed_vllm


def main() -> None:
    """Write the list."""
    sources = installed_vllm()
    if sources is None:
        raise SystemExit("vLLM is not installed: its sources are what the list is made of")
    found = read_all(sources, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    lines = [
        f"{json.dumps(name)}: {json.dumps(values)}"
        for name, served in found.items()
        if (values := served.to_dict())
    ]
    SERVED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{SERVED}: {len(lines)} architectures")


if __name__ == "__main__":
    main()
