"""Several models side by side: growth rates with intervals, verdicts, and which of them differ."""
