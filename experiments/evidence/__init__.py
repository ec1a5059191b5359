"""Claims, and the statistics that decide them."""
