"""Decoding: one loop that drives every system, and the contract between the loop and the models.

system.py       the contract: System, Member, Pair, Pass
base_loop.py    what the loops of all engines have in common
loop.py         which rows run, what each writes, when it ends
rows.py         a row: one sample from its request to its record
sampling.py     temperature, top-k, top-p, min-p, bans; noise that depends on the sample alone
penalties.py    repetition, presence and frequency penalty
speculation.py  how long the drafted blocks are
text.py         tokens as text, one at a time; stop strings
combining.py    rows of one batch that have formulas and alphas of their own
generation.py   what a row that has ended gives its caller
choice.py       the choice of tokens from the logits of a pass
logprobs.py     log-probabilities of single tokens, and of the likeliest
thought.py      where a completion's thought ends and its answer begins
unshifted.py    tokens of the base that a formula leaves alone
truncation.py   logits of a server that lists only the largest
broken.py       logits from which no token can be chosen: whose they are
memory.py       how many rows fit into memory
score.py        log-probabilities of given tokens
"""
