"""Benchmarks that print ratios from one run: `make bench` or `tessera bench`."""
