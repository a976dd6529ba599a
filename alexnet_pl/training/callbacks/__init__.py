"""Lightning callbacks: checkpoints, NaN monitoring, logging, dashboard."""
