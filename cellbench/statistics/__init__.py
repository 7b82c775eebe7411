"""Whether differences are real: intervals, paired tests, rankings; no torch."""
