"""The co-supervised training loop: steps, checkpoints, and the watch over the method's failure signatures."""
