"""Builds the self-test and runs it: python -m cuda_emulator.selftest [CASE SEED ...].

Without arguments it lists its cases.
"""

from __future__ import annotations

import subprocess
import sys

from cuda_emulator import building

if __name__ == "__main__":
    sys.exit(subprocess.call([building.selftest(), *sys.argv[1:]]))
