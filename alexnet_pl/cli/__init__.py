"""Command-line interface: one module per command of ``alexnet COMMAND``, argument parsing and printing only."""
