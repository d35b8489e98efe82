"""What the benchmarks share: contenders that take turns, and the peers among them."""
