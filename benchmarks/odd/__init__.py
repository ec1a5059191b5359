"""Calls of the public functions, and odd values for their arguments."""
