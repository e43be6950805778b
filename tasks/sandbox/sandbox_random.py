"""The states of random number generators, which a test seeds before it runs the program.

Valid for Python 3.8, standard library only: it runs under other interpreters, too.
"""

import sys


def states():
    """Module -> the state of its generator, for the modules that are loaded."""
    found = {}
    if "random" in sys.modules:
        found["random"] = sys.modules["random"].getstate()
    if "numpy" in sys.modules:
        found["numpy"] = sys.modules["numpy"].random.get_state()
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].get_rng_state()
    return found


def restore(found):
    """Gives the generators of this process these states."""
    for name, state in found.items():
        if name == "random":
            __import__("random").setstate(state)
        elif name == "numpy":
            __import__("numpy").random.set_state(state)
        else:
            __import__("torch").set_rng_state(state)
