"""Coordinate check: how lengths in a network and in its first updates scale with width and depth."""
