"""Benchmarks: `python -m bench`, `python -m bench.train`, `python -m bench.profile`."""
