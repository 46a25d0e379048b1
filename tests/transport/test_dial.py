"""Connections are made to the address that answers, are made anew when they are old, and leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from certificates import served, trusting, write_authority
from http2_server import StreamWire, http2_server
from raw_server import PATIENCE, Asked, RawServer, Wire, raw_server, silent_address

from autobot_llm.errors import ProviderUnavailable
from autobot_llm.transport.network import AddressInfo, Network
from autobot_llm.transport.pool import HttpPool, PoolLimits

NAME = "models.example"


class Names:
    """A resolver whose records may be changed."""

    def __init__(self, *addresses: tuple[str, int]) -> None:
        self.addresses = list(addresses)
        self.num_asked = 0

    async def __call__(self, host: str, port: int) -> Sequence[AddressInfo]:
        assert host == NAME
        self.num_asked += 1
        if not self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in self.addresses]


def port_of(server: RawServer) -> int:
    return int(server.url.rpartition(":")[2])


async def echo(wire: Wire, asked: Asked) -> None:
    await wire.reply(asked.path.encode())


async def echo_2(stream: StreamWire, asked: Asked) -> None:
    await stream.reply(asked.path.encode())


def named(names: Names, limits: PoolLimits | None = None, *, scheme: str = "http") -> HttpPool:
    tls = trusting() if scheme == "https" else None
    network = Network(resolve=names)
    return HttpPool(f"{scheme}://{NAME}", name="test", limits=limits or PoolLimits(), network=network, tls=tls)


async def test_an_address_that_refuses_is_passed_over_at_once() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with raw_server(echo) as server:
            pool = named(Names(closed.getsockname(), ("127.0.0.1", port_of(server))))
            assert (await pool.request("GET", "/x")).body == b"/x"
            await pool.close()
        pool = named(Names(closed.getsockname(), closed.getsockname()))
        with pytest.raises(ProviderUnavailable, match=f"test cannot be reached at {NAME}:80: ") as caught:
            await pool.request("GET", "/x")
        assert not caught.value.may_have_begun
        await pool.close()


async def test_an_address_that_is_silent_holds_the_next_one_up_for_a_moment_only() -> None:
    with silent_address() as address:
        async with raw_server(echo) as server:
            pool = named(Names(address, ("127.0.0.1", port_of(server))))
            assert (await pool.request("GET", "/x", timeout=3)).body == b"/x"
            await pool.close()


async def test_a_name_that_is_not_known_is_told() -> None:
    pool = named(Names())
    with pytest.raises(ProviderUnavailable, match=f"cannot be reached at {NAME}:80: .*not known"):
        await pool.request("GET", "/")
    await pool.close()


async def test_an_old_connection_makes_way_for_one_to_the_changed_address() -> None:
    async with raw_server(echo) as first, raw_server(echo) as second:
        names = Names(("127.0.0.1", port_of(first)))
        pool = named(names, PoolLimits(max_age_seconds=0.05))
        await pool.request("GET", "/1")
        await pool.request("GET", "/2")
        assert (names.num_asked, first.num_accepted) == (1, 1)
        names.addresses = [("127.0.0.1", port_of(second))]
        await asyncio.sleep(0.06)
        assert (await pool.request("GET", "/3")).body == b"/3"
        assert ([asked.path for asked in second.asked], names.num_asked) == (["/3"], 2)
        await first.until(lambda seen: seen.num_open == 0)
        names.addresses = []  # no name, no new connection: the old one is better than none
        await asyncio.sleep(0.06)
        assert (await pool.request("GET", "/4")).body == b"/4"
        assert second.num_accepted == 1
        await pool.close()


async def test_an_old_shared_connection_is_replaced_beside_its_streams(caplog: pytest.LogCaptureFixture) -> None:
    go_on = asyncio.Event()

    async def play(stream: StreamWire, asked: Asked) -> None:
        if asked.path == "/long":
            await go_on.wait()
        await stream.reply(asked.path.encode())

    async with http2_server(play) as first, http2_server(echo_2) as second:
        names = Names(("127.0.0.1", int(first.url.rpartition(":")[2])))
        pool = named(names, PoolLimits(max_age_seconds=0.05), scheme="https")
        long = asyncio.create_task(pool.request("GET", "/long"))
        await first.until(lambda seen: len(seen.asked) == 1)
        names.addresses = []
        await asyncio.sleep(0.06)
        with caplog.at_level(logging.WARNING, "autobot_llm.transport"):
            assert (await pool.request("GET", "/still")).body == b"/still"  # and a new one is not to be had
            await asyncio.sleep(0.02)
            assert (await pool.request("GET", "/still")).body == b"/still"
        assert ["could not be replaced" in record.message for record in caplog.records] == [True]
        names.addresses = [("127.0.0.1", int(second.url.rpartition(":")[2]))]
        await asyncio.sleep(0.06)
        await pool.request("GET", "/now")
        await second.until(lambda seen: seen.num_accepted == 1)
        await pool.request("GET", "/new")
        assert [asked.path for asked in second.asked] == ["/new"]
        assert first.num_open == 1, "a stream is under way there"
        go_on.set()
        assert (await long).body == b"/long"
        await first.until(lambda seen: seen.num_open == 0)
        await pool.close()


async def test_a_pool_that_is_asked_to_be_warm_has_its_connection_before_the_first_request() -> None:
    async with http2_server(echo_2) as shared, raw_server(echo, tls=served("http/1.1")) as single:
        for server in (shared, single):
            pool = HttpPool(server.url, name="test", tls=trusting())
            await pool.warm()
            await pool.warm()
            assert pool.metrics()["num_idle_connections"] == pool.metrics()["num_connects"] == 1
            async with pool.stream("GET", "/x") as answer:
                assert answer.is_reused
                assert await answer.body(10) == b"/x"
            assert server.num_accepted == 1
            await pool.close()
    with pytest.raises(ProviderUnavailable, match="cannot be reached"):
        await pool_to_nowhere().warm()


def pool_to_nowhere() -> HttpPool:
    return HttpPool("https://nowhere.invalid", name="test")


def connections() -> list[object]:
    return [one for one in psutil.Process().net_connections() if one.status != psutil.CONN_LISTEN]


@pytest.mark.parametrize("by_closing", [True, False])
async def test_giving_up_within_a_handshake_leaves_no_socket_and_no_task(by_closing: bool) -> None:
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections and never says a word

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        before, tasks_before = set(connections()), set(asyncio.all_tasks())
        pool = HttpPool(f"https://127.0.0.1:{listener.getsockname()[1]}", name="test", tls=trusting())
        asking = [asyncio.create_task(pool.request("GET", "/")) for _ in range(3)]
        async with asyncio.timeout(PATIENCE):
            while not accepted:
                await asyncio.sleep(0.002)
        await asyncio.sleep(0.02)
        if by_closing:
            await pool.close()
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert {type(result) for result in results} == {ProviderUnavailable}
        else:
            for task in asking:
                task.cancel()
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert {type(result) for result in results} == {asyncio.CancelledError}
        accepted[0].setblocking(False)
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(ConnectionError):
                while await asyncio.get_running_loop().sock_recv(accepted[0], 65536):
                    pass  # the beginning of the handshake, and then the end
        for one in accepted:
            one.close()
        await pool.close()
        await asyncio.sleep(0.01)
        assert set(asyncio.all_tasks()) == tasks_before
        assert {one for one in connections() if one not in before and one.status not in ("TIME_WAIT", "NONE")} == set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


async def test_closing_leaves_no_socket_and_no_task_and_the_limits_are_those_that_are_promised() -> None:
    assert (PoolLimits().max_connections, PoolLimits().max_idle) == (100, 20)

    async def slow(wire: Wire, asked: Asked) -> None:
        await asyncio.sleep(0.05)
        await wire.reply(b"ok")

    async def slow_2(stream: StreamWire, asked: Asked) -> None:
        await asyncio.sleep(0.05)
        await stream.reply(b"ok")

    process, tasks_before = psutil.Process(), set(asyncio.all_tasks())
    for server_of in (lambda: raw_server(slow), lambda: http2_server(slow_2)):
        async with server_of() as server:  # type: ignore[attr-defined]
            num_files = process.num_fds()
            pool = HttpPool(server.url, name="test", tls=trusting() if server.url.startswith("https") else None)
            asking = [asyncio.create_task(pool.request("GET", "/")) for _ in range(150)]
            await asyncio.gather(*asking)
            assert server.num_accepted <= 100
            await pool.close()
            await server.until(lambda seen: seen.num_open == 0)
            await asyncio.sleep(0.02)
            assert process.num_fds() <= num_files
    assert set(asyncio.all_tasks()) <= tasks_before


def test_the_authorities_that_ssl_cert_file_names_are_trusted(tmp_path: Path) -> None:
    write_authority(tmp_path / "authority.pem")
    program = (
        "import asyncio, sys; from autobot_llm.transport.pool import HttpPool\n"
        "async def main():\n"
        "    pool = HttpPool(sys.argv[1], name='test')\n"
        "    print((await pool.request('GET', '/x')).body)\n"
        "    await pool.close()\n"
        "asyncio.run(main())"
    )

    async def run(environ: dict[str, str]) -> tuple[str, str]:
        async with http2_server(echo_2) as server:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", program, server.url, env=environ,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            out, err = await child.communicate()
            return out.decode(), err.decode()

    plain = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
    out, _ = asyncio.run(run({**plain, "SSL_CERT_FILE": str(tmp_path / "authority.pem")}))
    assert out == "b'/x'\n"
    out, err = asyncio.run(run(plain))
    assert out == "" and "certificate verify failed" in err
