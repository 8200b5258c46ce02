"""Benchmarks of normwise's batch norm: ``python -m benchmarks`` (see docs/benchmarks.md)."""
