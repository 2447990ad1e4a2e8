"""The formats of quantised weights that we read ourselves: each turns the tensors of one weight back into the weight.

`recognise.stored_formats` chooses them from config.json; `model/weights.py` reads the tensors and calls them.
"""
