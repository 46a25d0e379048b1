"""Make what speculation needs for one's own model: Medusa heads, an EAGLE-3 draft, a draft model.

All three learn from what the model itself says (self-distillation). torch is loaded with the first module below here.
"""
