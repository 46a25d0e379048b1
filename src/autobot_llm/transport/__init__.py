"""The HTTP edge towards providers: connections, event streams, failures. Knows HTTP; knows nothing of models."""
