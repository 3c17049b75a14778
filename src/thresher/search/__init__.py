"""Search a pruning schedule for a finished model, without training."""
