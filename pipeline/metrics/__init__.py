"""What a running engine does: its counters turned into figures, and shown live."""
