"""How derivatives go through a run: one pass for each way (paper, eq. 8 and 11)."""
