"""Modules that are not plain: sharded ones become whole for a measurement, and others are refused."""
