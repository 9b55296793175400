"""The ways in which model families write thoughts and calls of functions, as data."""
