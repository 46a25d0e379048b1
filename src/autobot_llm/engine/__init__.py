"""Our own inference engine. torch is imported below here and nowhere else."""

import os

# Read when torch loads its OpenMP: its threads wait for the next operator for some 50 microseconds, which the
# operators of one step need, and then sleep, so that an idle engine leaves the cores to others. (docs/log.md)
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
