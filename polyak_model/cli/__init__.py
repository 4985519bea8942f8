"""The command `polyak-model`: one module per subcommand, with its options and its output."""
