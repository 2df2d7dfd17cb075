"""period (a), found by neural_sr.py in planets.csv."""
from math import sqrt


def formula(axis_AU):
    # axis_AU: axis (AU)
    return 0.9997986 * (sqrt(axis_AU) * axis_AU)
