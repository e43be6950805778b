"""A base behind an OpenAI-compatible API, as a member of a triple; docs/black_box.md.

settings.py  how an endpoint is asked, and what that may cost
names.py     the server's names of tokens -> token ids
answer.py    one position's log-probabilities, as far as they are known
store.py     answers and spending on disk, so that nothing is paid twice
client.py    requests: retries, rate limits, the budget
probe.py     what the server offers, found out by asking
member.py    the member that the decode loop drives
"""
