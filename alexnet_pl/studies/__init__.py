"""Studies: many runs of one sweep, their state, statistics, plots and reports."""
