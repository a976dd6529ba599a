"""Benchmarks of the training loop and of the input pipeline."""
