"""Checkpoint formats: one file a format, the table of tensor names, and the bounded reads they share."""
