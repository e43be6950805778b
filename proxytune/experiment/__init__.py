"""Systems x tasks: generate what is missing, score, save.

runner.py    one experiment from its configuration to its table
cells.py     one (system, task): what to generate, where, and what it rests on
generate.py  generating what the cells lack
checks.py    refusals, before a model is loaded
progress.py  progress bars
tracking.py  Weights & Biases
"""
