"""The feature pass: a frozen backbone run once for all heads of a cohort, with caches in memory, on disk and at a URL."""
