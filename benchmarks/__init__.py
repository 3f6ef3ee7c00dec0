"""Measurements, run by hand as modules; see README.md in this folder."""
