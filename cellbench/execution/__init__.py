"""Planned runs carried out: in this process, in local processes or on Ray."""
