"""The training loop and what it keeps in a run folder (Sec. 4.2)."""
