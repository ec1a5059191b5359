"""What a configuration means: schemas, the objects it builds, its columns, and command lines."""
