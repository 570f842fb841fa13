"""Before torch is loaded: threads that wait leave the cores to the ranks and readers that tests start."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
