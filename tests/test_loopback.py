"""What runs on this machine is asked without a proxy."""

import pytest

from proxytune.errors import UserError
from proxytune.loopback import PROXIES, is_loopback, openai_client, without_proxies
from tasks.alpaca_judge import AlpacaJudge
from tests.api_triple import over_http, save_triple, served
from tests.openai_server import openai_server

NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.8.9.1/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://LOCALHOST./v1", True),
        ("http://base.localhost/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://[::ffff:127.0.0.1]/v1", True),
        ("http://0.0.0.0:8000/v1", True),
        ("http://127.1:8000/v1", True),
        ("http://0:8000/v1", True),
        ("http://localhost.localdomain:8000/v1", True),
        ("http://ip6-localhost:8000/v1", True),
        ("http://10.1/v1", False),
        ("http://cafe/v1", False),
        ("http://localhost@example.com/v1", False),
        ("https://api.openai.com/v1", False),
        ("http://10.0.0.1/v1", False),
        ("http://localhost.example.com/v1", False),
        ("http://127.0.0.1.example.com/v1", False),
        ("nonsense", False),
    ],
)
def test_loopback(url, here):
    assert is_loopback(url) is here


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    ("name", "proxy"),
    [
        ("HTTP_PROXY", NOWHERE),
        pytest.param("all_proxy", NOWHERE, marks=pytest.mark.slow),
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        pytest.param("https_proxy", "socks5://127.0.0.1:9", marks=pytest.mark.slow),
    ],
)
def test_a_base_on_this_machine_takes_no_proxy(tmp_path, monkeypatch, name, proxy):
    """Fails on 538a493: "nobody answers", or an ImportError for a SOCKS proxy."""
    save_triple(tmp_path)
    with served(tmp_path) as url:
        monkeypatch.setenv(name, proxy)
        assert over_http(tmp_path, url).generate(["a"], max_new_tokens=2)


@pytest.mark.thinned(1)
@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY"])
def test_a_judge_on_this_machine_takes_no_proxy(monkeypatch, name):
    """Fails on 538a493: the judge's requests went to the proxy."""
    monkeypatch.setenv(name, NOWHERE)
    with openai_server(lambda body: "answer") as server:
        judge = AlpacaJudge(base_url=server.url, max_retries=0, timeout=5)
        ask = judge._ask_openai({"model_name": "m"})
        prompt = "<|im_start|>user\nhi\n<|im_end|>"
        assert next(iter(ask([prompt])))[prompt]["text"] == "answer"


def test_other_hosts_take_the_proxy(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "socks5://user:secret@127.0.0.1:9")
    try:
        client = openai_client("https://example.org/v1", api_key="none")
    except UserError as error:  # without the package for SOCKS
        assert "through the proxy of HTTPS_PROXY" in str(error)
        assert "secret" not in str(error)
    else:
        assert client.base_url.host == "example.org"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HTTPS_PROXY", "http://proxy:port", "the proxy of HTTPS_PROXY is no address"),
        ("all_proxy", "http://[::1", "the proxy of all_proxy is no address"),
        ("HTTPS_PROXY", "http://proxy:1\n", "the proxy of HTTPS_PROXY is no address"),
        ("HTTPS_PROXY", "ftp://proxy:1", "through the proxy of HTTPS_PROXY"),
        ("SSL_CERT_FILE", "/not/there.pem", "SSL_CERT_FILE=/not/there.pem"),
    ],
)
def test_an_environment_that_cannot_be_used_is_named(monkeypatch, name, value, said):
    """All but ftp ended in the HTTP library's traceback."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        openai_client("https://example.org/v1", api_key="none")
    assert openai_client("http://localhost:9/v1", api_key="none")


def test_an_address_of_no_port_is_refused():
    with pytest.raises(UserError, match="http://host:port/v1 is no address"):
        openai_client("http://host:port/v1", api_key="none")


def test_a_base_url_from_the_environment(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:9/v1")
    assert openai_client(None, api_key="none").base_url.host == "localhost"


def test_without_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.setenv(name.lower(), NOWHERE)
    without_proxies()
    import os

    assert not any(os.environ.get(key) or os.environ.get(key.lower()) for key in PROXIES)
