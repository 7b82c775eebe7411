"""What the Python API adds to the packages below it: experiments as functions, and their results as tables."""
