"""WikiText-2 perplexity and KL of a quantised checkpoint: ``python tests/wikitext.py TEXT MODEL CKPT [CKPT ...]``.

TEXT is the raw test split. GPTQ convention: the text is tokenised once and cut into disjoint windows of 2048 tokens. With
--bos each window is led by the tokenizer's BOS, which Gemma needs. Models run in bfloat16 in transformers, quantised weights
decoded.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from offline_quantize.evaluate import compare, load_model, windows


def joined(raw: str) -> str:
    """The evaluation string of the raw file, as the datasets library's rows joined by two newlines."""
    return "\n\n".join(line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--bos", action="store_true")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(joined(args.text.read_text(encoding="utf-8")), add_special_tokens=False, verbose=False)["input_ids"]
    tokens = windows(ids, args.length, args.windows, tokenizer.bos_token_id if args.bos else None)
    reference = load_model(args.model, torch.bfloat16)
    for checkpoint in args.checkpoints:
        start = time.monotonic()
        result = compare(reference, load_model(checkpoint, torch.bfloat16), tokens).to_dict()
        print(json.dumps({"checkpoint": str(checkpoint), "windows": len(tokens), "length": args.length, "bos": args.bos,
                          **result, "seconds": round(time.monotonic() - start)}), flush=True)


if __name__ == "__main__":
    main()
