"""The models a user builds and calls: the backbone (token ids -> hidden states) and the causal language model."""
