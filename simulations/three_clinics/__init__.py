"""Three clinics and one small epidemic: a world that runs in a second, with a known truth."""
