"""Report: console, logs, metrics, loss curves and trackers."""
