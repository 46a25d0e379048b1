"""The semantic cache: what a question means (meaning), which ones are kept (questions), and the link (cache)."""
