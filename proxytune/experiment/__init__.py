"""Runs an experiment: several systems on several tasks, generated, scored and compared.

runner.py       one experiment, from its configuration to its table
cells.py        one system on one task: what it lacks, and its scores
planned.py      the cells that a configuration asks for
identity.py     what the completions of a cell depend on; who may write to a folder
generate.py     opens one system after the other and lets its cells generate
sharing.py      the points of a sweep read each other's finished cells
placement.py    how many processes share a run, and what they cannot share
replicas.py     several processes that each hold the whole system
ray_crew.py     these processes on Ray
ranks.py        several processes that each hold a part of every model (torchrun)
completions.py  the prompts of a cell, and its file of answers
given_tasks.py  the tasks of a configuration, and whether their classes give what is relied on
checks.py       refuses mistakes before a model is loaded
thoughts.py     the same about experts that think
prompts.py      renders every prompt before a model is loaded, for templates refuse some
progress.py     bars on a terminal, else a line a minute
forecast.py     how long the rest of a run will take
watching.py     what a results folder tells of a run in progress
watched_cell.py its cells
trial.py        `proxytune check`: a triple tried on a few examples
costs.py        what a triple costs, and what drafting promises
tracking.py     Weights & Biases
"""
