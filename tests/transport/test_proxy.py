"""Proxies of the environment are used where they should be, and nowhere else; what they refuse is told."""

from __future__ import annotations

import asyncio
import base64

import pytest
from certificates import served, trusting
from http2_server import StreamWire, http2_server
from proxy_server import proxy_to
from raw_server import Asked, Wire, raw_server

from autobot_llm.errors import ConfigurationError, LLMError, ProviderError, ProviderUnavailable
from autobot_llm.settings import Settings, load_settings
from autobot_llm.transport.network import Network
from autobot_llm.transport.pool import HttpPool
from autobot_llm.transport.proxy import Proxies, Proxy, read_proxy

ORIGIN = "models.example"


def network_of(**variables: str) -> Network:
    return Network.of(load_settings(environ=variables, env_file=None))


async def echo(wire: Wire, asked: Asked) -> None:
    await wire.reply(asked.path.encode())


async def echo_2(stream: StreamWire, asked: Asked) -> None:
    await stream.reply(asked.path.encode())


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy"])
async def test_https_goes_through_a_tunnel_whatever_version_the_server_speaks(variable: str) -> None:
    async with http2_server(echo_2) as new, raw_server(echo, tls=served("http/1.1")) as old:
        for server in (new, old):
            async with proxy_to(server.url) as proxy:
                network = network_of(**{variable: proxy.url.replace("http://", "http://ann:p%40ss@")})
                pool = HttpPool(f"https://{ORIGIN}/v1", name="test", network=network, tls=trusting())
                assert (await pool.request("GET", "/x")).body == b"/v1/x"
                assert (await pool.request("GET", "/y")).body == b"/v1/y"
                await pool.close()
                (head,) = proxy.asked
                assert head[0] == f"CONNECT {ORIGIN}:443 HTTP/1.1"
                pair = base64.b64encode(b"ann:p@ss").decode()
                assert f"proxy-authorization: Basic {pair}" in head
                assert "authorization" not in "".join(server.asked[0].headers), "what is the proxy's stays there"
        assert new.protocols == ["h2"]


async def test_http_is_asked_of_the_proxy_with_the_whole_address() -> None:
    async with raw_server(echo) as server, proxy_to(server.url) as proxy:
        network = network_of(HTTP_PROXY=proxy.url.replace("http://", "http://ann:secret@"))
        pool = HttpPool(f"http://{ORIGIN}/v1?a=1", name="test", network=network)
        assert (await pool.request("GET", "/x")).body == f"http://{ORIGIN}/v1/x?a=1".encode()
        await pool.close()
    headers = server.asked[0].headers
    assert headers["host"] == ORIGIN
    assert base64.b64decode(headers["proxy-authorization"].removeprefix("Basic ")) == b"ann:secret"


@pytest.mark.parametrize(
    ("refusal", "kind", "words"),
    [
        (
            b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
            ProviderError,
            "407 .*it asks for a user and a password",
        ),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", ProviderError, "does not reach models.example:443: 403 Forbidden"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", ProviderUnavailable, "does not reach models.example:443: 502"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", ProviderError, "is no HTTP proxy"),
        (b"HTTP/1.1 200", ProviderUnavailable, "gave no answer"),
    ],
)
async def test_what_a_proxy_refuses_is_told(refusal: bytes, kind: type[LLMError], words: str) -> None:
    async with proxy_to("http://x:1", refusal) as proxy:
        network = network_of(HTTPS_PROXY=proxy.url.replace("http://", "http://ann:secret@"))
        pool = HttpPool(f"https://{ORIGIN}", name="test", network=network, tls=trusting())
        with pytest.raises(kind, match=words) as caught:
            await pool.request("GET", "/")
        assert type(caught.value) is kind
        assert "test" in caught.value.message and "secret" not in caught.value.message
        await pool.close()


async def test_a_plain_request_that_the_proxy_refuses_is_no_fault_of_the_caller() -> None:
    refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n"
    async with proxy_to("http://x:1", refusal) as proxy:
        pool = HttpPool(f"http://{ORIGIN}", name="test", network=network_of(HTTP_PROXY=proxy.url))
        with pytest.raises(ProviderError, match="the proxy asks for a user and a password") as caught:
            await pool.request("GET", "/")
        assert type(caught.value) is ProviderError
        await pool.close()


async def test_a_proxy_that_is_not_there_is_named() -> None:
    network = network_of(HTTPS_PROXY="http://127.0.0.1:1")
    pool = HttpPool(f"https://{ORIGIN}", name="test", network=network, tls=trusting())
    with pytest.raises(ProviderUnavailable, match="models.example:443 through the proxy 127.0.0.1:1: "):
        await pool.request("GET", "/")
    await pool.close()


async def test_giving_up_while_the_proxy_says_nothing_closes_the_connection_to_it() -> None:
    has_come, is_over = asyncio.Event(), asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        has_come.set()
        while await reader.read(1000):
            pass
        is_over.set()
        writer.close()

    listener = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    network = network_of(HTTPS_PROXY=f"127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    pool = HttpPool(f"https://{ORIGIN}", name="test", network=network, tls=trusting())
    asking = asyncio.create_task(pool.request("GET", "/"))
    async with asyncio.timeout(5):
        await has_come.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await is_over.wait()
    await pool.close()
    listener.close()


@pytest.mark.parametrize(
    ("no_proxy", "host", "is_direct"),
    [
        ("example.com", "example.com", True),
        ("example.com", "api.EXAMPLE.com.", True),
        ("example.com", "badexample.com", False),
        (".example.com", "example.com", False),
        (".example.com", "api.example.com", True),
        ("*.example.com", "api.example.com", True),
        ("example.com:8443", "example.com", False),
        ("example.com:443", "example.com", True),
        ("a, 10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/99", "10.1.2.3", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("2001:db8::1", "2001:db8::1", True),
        ("*", "example.com", True),
        ("a", "localhost", True),
        ("a", "127.0.0.1", True),
        ("a", "::1", True),
        ("a", "example.com", False),
    ],
)
def test_what_is_reached_without_a_proxy(no_proxy: str, host: str, is_direct: bool) -> None:
    proxies = network_of(HTTPS_PROXY="http://proxy:3128", NO_PROXY=no_proxy).proxies
    assert (proxies.of(host, 443, is_tls=True) is None) == is_direct
    assert proxies.of(host, 443, is_tls=False) is None, "no proxy is set for http"


def test_the_address_of_a_proxy_is_read_and_a_wrong_one_refused() -> None:
    assert read_proxy("proxy.example:3128") == read_proxy("http://proxy.example:3128/") == Proxy("proxy.example", 3128)
    assert read_proxy("http://[::1]:1") == Proxy("::1", 1)
    assert "secret" not in repr(read_proxy("http://ann:secret@proxy.example"))
    for wrong in ("socks5://a:1", "https://a:1", "http://", "http://a:port"):
        with pytest.raises(ConfigurationError, match="the proxy's address"):
            read_proxy(wrong)
        with pytest.raises(ConfigurationError, match=r"HTTPS_PROXY=\*+: expected the address of an HTTP proxy"):
            load_settings(environ={"HTTPS_PROXY": wrong}, env_file=None)
    assert Settings().https_proxy is None
    assert Proxies().of("example.com", 443, is_tls=True) is None


def test_a_proxy_may_be_set_in_both_cases_if_they_agree() -> None:
    both = load_settings(environ={"HTTPS_PROXY": "http://a:1", "https_proxy": "http://a:1"}, env_file=None)
    assert both.https_proxy == "http://a:1"
    with pytest.raises(ConfigurationError, match="HTTPS_PROXY and https_proxy are both set"):
        load_settings(environ={"HTTPS_PROXY": "http://a:1", "https_proxy": "http://b:1"}, env_file=None)
