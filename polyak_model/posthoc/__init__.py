"""Averages rebuilt from stored ones: profiles, coefficients and errors, in NumPy alone."""
