"""The hot loop of contagion: one declarative spec and interchangeable executors that agree to the bit."""
