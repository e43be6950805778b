"""Decoding: one loop for every system, and the contract that models keep to be driven by it.

system.py       the contract: System, Member, Pair, and what a Pass says
loop.py         which rows run, what each writes, when it ends
rows.py         a row: one sample from its request to its record
sampling.py     temperature, top-k, top-p, bans; noise that depends on the sample alone
speculation.py  how long the drafted blocks are
text.py         tokens as text, one at a time; stop strings
truncation.py   logits of which a server shows the largest only
memory.py       how many rows fit
score.py        log-probabilities of given tokens
"""
