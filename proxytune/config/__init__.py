"""What a run or a server may be told: the schema of conf/, and its models as specs.

schema.py     one dataclass per node; Hydra refuses any key that they lack
overrides.py  parts that may be left out: set, extended and unset in one form
given.py      files of one's own on the command line
formulas.py   the configured formula, its alphas and its models
specs.py      the configured models as `ModelSpec`s
"""
