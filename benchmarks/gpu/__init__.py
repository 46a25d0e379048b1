"""The sections of benchmarks/engine_gpu.py, and what they share."""
