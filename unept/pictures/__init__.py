"""Pictures of predictions, of the network's inside and of scores (Fig. 1, 3-8)."""
