"""Arithmetic and traffic of what runs, and the time that a device's limits allow for it."""
