"""Plain checkpoints, quantized while vLLM loads them."""
