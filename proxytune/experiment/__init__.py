"""Runs an experiment: several systems on several tasks, generated, scored and compared.

runner.py       one experiment, from its configuration to its table
cells.py        one system on one task: what it lacks, and its scores
identity.py     what the completions of a cell depend on; who may write to a folder
generate.py     opens one system after the other and lets its cells generate
completions.py  the prompts of a cell, and its file of answers
checks.py       refuses mistakes before a model is loaded
prompts.py      renders every prompt before a model is loaded, for templates refuse some
progress.py     bars on a terminal, else a line a minute
forecast.py     how long the rest of a run will take
tracking.py     Weights & Biases
"""
