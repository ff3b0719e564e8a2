"""Turning logits into tokens: sampling, and the loop that writes one token after another."""
