"""What works in front of every provider: caches, deduplication, prompt compression."""
