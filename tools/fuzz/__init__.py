"""Fuzzing of the parsers of the format: ``make fuzz``."""
