"""Which model evaluates and predicts: the average, the raw model or both."""
