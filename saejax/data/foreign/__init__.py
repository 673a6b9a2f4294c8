"""Activations made by other programs: one small file a format, behind `interface`."""
