"""Guess several tokens ahead, verify them in one step. Lossless: the answers are those of the engine without it."""
