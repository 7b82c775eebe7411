"""Finished runs as leaderboards, verdicts, figures and reports; no torch, and nothing is run."""
