"""One module for each command of `polyak-model`: its options, its checks and what it prints."""
