"""Figures of a run (charts, image grids) and its HTML report."""
