"""Weights in 8 and 4 bits: which schemes there are, how folders store them, and how a model becomes one of them."""
