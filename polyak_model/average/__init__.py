"""One average of one model: its copy, its pairing with the raw weights, its update."""
