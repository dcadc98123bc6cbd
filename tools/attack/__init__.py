"""Damaged checkpoints at every door: each must be refused helpfully, or read as the original."""
