"""How far samples are from data: functions of feature arrays [n, d], in float64 and NumPy."""
