"""Tensors of a quantized checkpoint: checked, counted, and named where one is missing."""
