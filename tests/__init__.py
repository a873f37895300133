"""The tests, a folder for each area. What several test files share stands in `common`: no test file
imports another. Every folder is a package, so that `tests.common` is found from the root of the
repository whichever file is run, and two files may have the same name.
"""

import os

# Several processes of pytest-xdist share the processor, and a thread that spins while it waits
# takes it from them. OpenMP reads this once, when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
