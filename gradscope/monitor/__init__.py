"""The same measurements while a network trains: records, alarms, and the first layer that is not finite."""

from gradscope.monitor.monitor import Monitor

__all__ = ["Monitor"]
