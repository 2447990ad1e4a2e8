"""Admission: how a tokenized request is checked, waits, and leaves as sequences with rows."""
