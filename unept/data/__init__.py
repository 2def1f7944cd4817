"""Datasets and training transforms (Sec. 4.1, 4.2)."""
