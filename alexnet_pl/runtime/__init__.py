"""Shared infrastructure: errors, files, run directories, logging, signals, system information."""
