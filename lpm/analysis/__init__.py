"""What a run can be asked: whether its derivatives are true."""
