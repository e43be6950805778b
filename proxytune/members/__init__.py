"""Models as members of a system: each holds rows and gives the logits after them.

choose.py      chooses the member for a model, by comparing logits
cached.py      a model with a key-value cache
cache.py       the cache: rows of different lengths without holes
packed.py      passes without padding (CPU)
narrow.py      matrix products of two to five tokens (CPU)
graphs.py      steps recorded as CUDA graphs
recomputed.py  a model without a usable cache
translated.py  a model of another vocabulary that speaks the base's ids
halves.py      members that are one model: two prompts, or an adapter on and off
adapter.py     expert and antiexpert that share weights
facts.py       a model's longest row, device and tolerance
api/           a model that someone else's server runs
"""
