"""Distributed training: environment, collectives, single-node launcher."""
