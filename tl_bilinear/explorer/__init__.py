"""The explorer: one page in which a person reads a bilinear layer."""
