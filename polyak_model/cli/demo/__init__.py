"""`polyak-model demo`: the command, its images and its experiment."""
