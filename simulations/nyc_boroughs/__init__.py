"""Five New York boroughs, the first wave of COVID-19: a world whose institutions never show each other their data."""
