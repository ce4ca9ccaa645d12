"""Ways to run Tessera: the `tessera` command, the bundled checkpoint, benchmarks."""
