"""Running steps on a CUDA device: fused layers, captured graphs, and sampling that stays on the device."""
