"""Default settings. Imports nothing: the command line shows them in its help."""

BITS_PER_WEIGHT = 5.5
"""Nominal rate of a model."""

TP_MAX = 8
"""Widest tensor parallelism that a checkpoint is prepared for."""
