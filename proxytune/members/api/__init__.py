"""A base that an OpenAI-compatible server runs, as a member of a triple; docs/black_box.md.

settings.py      an endpoint, how to ask it, and the budget
names.py         the server's names of tokens -> token ids
answer.py        one position's log-probabilities, as far as the server lists them
distribution.py  arithmetic: are these values log-probabilities?
store.py         answers and spending on disk, so that nothing is paid twice
faults.py        what a server says when it fails: wait, ask otherwise, or end
client.py        requests: retries, rate limits, the budget
reading.py       the forms in which servers write lists
protocol.py      requests for log-probabilities, and their answers
probe.py         finds out what the server offers,
asking.py        by single requests;
verify.py        whether it lists the model's log-probabilities,
blocks.py        and how one request scores several positions
member.py        the member that the decode loop drives
"""
