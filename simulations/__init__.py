"""Scenarios: each folder holds the public part, the model's code and compact tables of figures."""
