"""Planning: which sequences run in the next step, with how many tokens each, and the step's record."""
