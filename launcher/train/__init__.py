"""Train: the loop, the step, and everything a step needs."""
