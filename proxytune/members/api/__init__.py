"""A base that an OpenAI-compatible server runs, as a member of a triple; docs/black_box.md.

settings.py  an endpoint, how to ask it, and the budget
names.py     the server's names of tokens -> token ids
answer.py    one position's log-probabilities, as far as the server lists them
store.py     answers and spending on disk, so that nothing is paid twice
client.py    requests: retries, rate limits, the budget
probe.py     finds out what the server offers, and asks it accordingly
member.py    the member that the decode loop drives
"""
