"""From the names of models to a system: which are loaded, whether they fit, how they read prompts.

spec.py        where a model comes from and how it is loaded
loaded.py      a model in memory
vocabulary.py  whether models share a vocabulary
translation.py tokens of one vocabulary as those of another
encoding.py    prompts as each member reads them
length.py      texts that are too long, found before all of them is encoded
formulas.py    whether a formula fits the models and their alphas
requested.py   a request's own formula and alphas
samplers.py    from settings to what chooses tokens, and to how completions think
ends.py        which tokens end a model's text, and which of them the base lacks
prompting.py   one example -> the text and the ids that each member reads
variables.py   variables of a chat template's own
adapters.py    whether an adapter fits its model, and whether it arrived
adapter_files.py  the files of an adapter
launched.py    which process this is, of those that torchrun started
ranks.py       models of which each of these processes holds a part
missing.py     what is said about files that cannot be had
load.py        checks before any weights are read; then the weights
build.py       loaded models -> a system
templates/     shipped chat templates
"""
