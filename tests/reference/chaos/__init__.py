"""Kills and stops the processes of an engine under load, and compares every answer with the undisturbed one.

`questions.py` has the requests and their comparison, `load.py` asks them, `faults.py` kills and stops, `idle.py` says
whether an engine has returned to rest, `report.py` has the figures, and `run.py` puts them together.
"""
