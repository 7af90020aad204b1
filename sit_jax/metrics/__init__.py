"""Distances between samples and data: functions of features [n, d], in NumPy and float64."""
