"""Forty-two New York hospitals, the winter wave of COVID-19: each knows its catchment and its beds, nobody else's."""
