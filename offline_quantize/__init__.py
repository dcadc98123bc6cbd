"""Offline quantizer."""
