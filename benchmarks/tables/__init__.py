"""Benchmark results: rows, tables, timing, and provenance."""
