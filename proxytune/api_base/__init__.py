"""A base behind an OpenAI-compatible API, as a member of a triple; docs/black_box.md.

names.py   the server's names of tokens -> token ids
answer.py  one position's log-probabilities, as far as they are known
store.py   answers and spending on disk, so that nothing is paid twice
client.py  requests: retries, rate limits, the budget
probe.py   what the server offers, found out by asking
member.py  the member that the decode loop drives
local.py   our own server for a base that has none
"""

from proxytune.api_base.client import Client, Unanswered, UpstreamError
from proxytune.api_base.member import ApiMember, open_api, settings_of

__all__ = ["ApiMember", "Client", "Unanswered", "UpstreamError", "open_api", "settings_of"]
