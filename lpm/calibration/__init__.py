"""Calibration (paper, 5.1): from a loss and its gradient to a posterior that carries its checks; knows no simulator."""
