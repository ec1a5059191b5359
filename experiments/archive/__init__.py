"""Results that runs have left: collected tables, reference results, labels and differences."""
