"""Models as members of a system: each holds rows and says what comes next.

choose.py      which of them wraps a model, found out by comparing logits
cached.py      a model with a key-value cache
cache.py       the cache: rows of different lengths without holes
packed.py      passes without padding (CPU)
narrow.py      products of two to five tokens (CPU)
graphs.py      steps recorded as CUDA graphs
recomputed.py  a model without a usable cache
adapter.py     expert and antiexpert that share weights
facts.py       what every member asks of its model
api/           a model behind someone else's server
"""
