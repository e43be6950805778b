"""Runs an experiment: several systems on several tasks, generated, scored and compared.

runner.py       one experiment, from its configuration to its table
cells.py        one system on one task: what it lacks, its scores, its folder
generate.py     opens one system after the other and lets its cells generate
completions.py  the prompts of a cell, and its file of answers
checks.py       refuses mistakes before a model is loaded
progress.py     progress bars
tracking.py     Weights & Biases
"""
