"""Turn frames into tables, figures and pages."""
