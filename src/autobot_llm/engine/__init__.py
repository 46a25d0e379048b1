"""Our own inference engine. torch is imported below here and nowhere else."""

import os

# Read when torch loads its OpenMP: its threads then sleep between parallel regions and leave the cores to others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
