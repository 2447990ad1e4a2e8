"""The grammar role: tells which tokens each structured request may sample next."""
