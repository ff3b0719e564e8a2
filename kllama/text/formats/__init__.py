"""The files that a vocabulary comes in, one reader a format, and the one that recognises them."""
