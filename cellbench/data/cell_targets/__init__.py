"""What a head learns beside the classes, so that touching cells can be separated."""
