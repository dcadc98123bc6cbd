"""Bytes that nobody wrote, at the parsers of the format: ``make fuzz``."""
