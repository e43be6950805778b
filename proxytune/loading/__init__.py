"""From the names of models to a system: which are loaded, whether they fit, how they read prompts.

spec.py        where a model comes from and how it is loaded
loaded.py      a model in memory
vocabulary.py  whether models share a vocabulary
ends.py        which tokens end a model's text, and which of them the base lacks
prompting.py   one example -> the text and the ids that each member reads
adapters.py    whether an adapter fits its model, and whether it arrived
launched.py    which process this is, of those that torchrun started
ranks.py       models of which each of these processes holds a part
missing.py     what is said about files that cannot be had
load.py        checks before any weights are read; then the weights
build.py       loaded models -> a system
templates/     shipped chat templates
"""
