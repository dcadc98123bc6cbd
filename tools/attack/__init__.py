"""Damaged checkpoints at every door: is each one refused in words that help, or read as it was?"""
