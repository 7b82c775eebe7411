"""What a run is: cards, experiments, search spaces, and reading them from TOML."""
