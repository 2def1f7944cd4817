"""Benchmarks: `pytest bench --benchmark-only`; tables: `python -m bench.report`; on a GPU: `python -m bench.run`."""
