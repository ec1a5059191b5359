"""What the project claims of a GPU, measured on one card."""
