"""Benchmarks. Installed: `bnorm-bench`, `bnorm-bench train`, `bnorm-bench profile`, `bnorm-bench
cost_model`; in the checkout also `python -m bench`, `python -m bench.train` and so on."""
