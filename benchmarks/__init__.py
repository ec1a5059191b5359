"""Side-by-side timings and long campaigns; each a command that prints a table and writes a frame."""
