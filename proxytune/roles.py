"""The names of a comparison's rows, and which models play in each."""

SYSTEMS = ("base", "expert", "antiexpert", "proxy", "tuned")  # in the order of a table's columns
ROLES = ("base", "expert", "antiexpert", "tuned")  # the models of a triple's file

# Which model plays which role of the engine: a single model is a base without helpers.
MEMBERS = {
    "base": {"base": "base"},
    "expert": {"base": "expert"},
    "antiexpert": {"base": "antiexpert"},
    "tuned": {"base": "tuned"},
    "proxy": {"base": "base", "expert": "expert", "antiexpert": "antiexpert"},
}
# One after the other so that neighbours share their models and the peak is the triple.
ORDER = ("expert", "antiexpert", "base", "proxy", "tuned")
