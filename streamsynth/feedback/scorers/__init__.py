"""Scorers of the user's own: a Python function, or a model behind an OpenAI-compatible HTTP endpoint.

specs.py      what `feedback.scorers` names, and what is wrong with it
scorer.py     when to ask, how often and for how much; what was answered is journaled before it is used
records.py    that journal
function.py   asks a Python function, in a process of its own (`worker.py`) that can be killed
endpoint.py   asks a model over HTTP
"""
