"""Report: what people look at. Console, logs, metrics, curves, trackers."""
