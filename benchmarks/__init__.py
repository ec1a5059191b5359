"""Side-by-side timings and long campaigns.  Each module is a command that prints a table and writes a frame."""
