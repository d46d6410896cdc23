"""Makes the modules beside this file (samples, oracles) importable by the tests below it: pytest adds its folder."""

import os

# Before torch is imported: models here are tiny, and two busy processes of two threads each stall each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
