"""Speculative decoding: several tokens of a sequence are proposed, then verified in one step."""
