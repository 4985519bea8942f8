"""`polyak-model demo`."""
