"""Scores of a model on a data set (Sec. 4.1)."""
