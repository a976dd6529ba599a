"""Benchmarks of the training loop, of its components and of the input pipeline."""
