"""One self-contained HTML page about a model, or about the networks of a sweep."""
