"""Attention heads: calls of attention that are seen, and statistics per head."""
