"""Who adds up the messages: one device, the ranks of one owner, or institutions that don't trust each other."""
