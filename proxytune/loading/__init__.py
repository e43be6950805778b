"""From names to a system: what is loaded, whether it fits together, how prompts are read.

spec.py        a model before it is loaded, and after
vocabulary.py  whether models share a vocabulary
prompting.py   one example -> the text and the ids that each member reads
load.py        refusals without weights; weights
build.py       loaded models -> a system
templates/     chat templates that are shipped
"""
