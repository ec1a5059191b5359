"""Gradient Scale Coefficients with standard errors, growth rates and verdicts."""
