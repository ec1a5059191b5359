"""Files that were made to do harm: one function makes each."""
