"""`gradscope.diff`: which layer of two models differs, and whether rounding explains it."""
