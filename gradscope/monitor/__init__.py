"""Measurements while a network trains: records, alarms, and the first layer with NaN or Inf."""

from gradscope.monitor.monitor import Monitor

__all__ = ["Monitor"]
