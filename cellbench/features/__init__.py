"""One frozen pass of a backbone, kept in memory, on disk or at a URL, for every head that learns from it."""
