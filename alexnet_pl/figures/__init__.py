"""Figures of a run and its HTML report."""
