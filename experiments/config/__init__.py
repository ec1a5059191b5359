"""Configurations: schemas, command lines, the objects built from a configuration, and its columns in a frame."""
