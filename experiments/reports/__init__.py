"""Frames turned into tables, figures and pages."""
