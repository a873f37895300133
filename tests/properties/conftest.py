"""How many examples hypothesis tries, by the environment variable BNORM_EXT_EXAMPLES.

A number: so many, the same each time (300 by default; `make test-all` sets 20,000). `random:N`: N
others each time, for a search; a failure prints how to see it again.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

chosen = os.environ.get("BNORM_EXT_EXAMPLES", "300")
count = int(chosen.removeprefix("random:"))
settings.register_profile(
    "bnorm_ext",
    max_examples=count,
    derandomize=not chosen.startswith("random:"),
    deadline=None,
    database=None,
    print_blob=True,
    # Fixtures set one thread and the seed of torch, once for all examples.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("bnorm_ext")
