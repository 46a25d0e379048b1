"""What makes an engine fast, worked out beforehand. Knows engines' settings; knows nothing of requests."""
