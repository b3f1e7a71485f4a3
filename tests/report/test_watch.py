"""The page while a run goes on: fresh, for this machine only, and nothing but the page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html import unescape
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from steep.errors import UserError
from steep.report import watch
from steep.report.watch import LivePage, make_server
from tests.report.runs import write_run

Get = Callable[..., tuple[int, str]]


@pytest.fixture
def get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Get]:
    """Asks a server that watches `tmp_path / "ko"`."""
    monkeypatch.setattr(watch, "_REST", 0)
    server = make_server([tmp_path / "ko"])
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()

    def ask(path: str, host: str | None = None, method: str = "GET") -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        headers = {"Host": host} if host is not None else {}
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        return answer.status, body

    yield ask
    server.shutdown()
    server.server_close()
    thread.join()


def data(get: Get) -> dict[str, Any]:
    return json.loads(get("/data.json")[1])


def test_it_listens_on_the_loopback_address_only(tmp_path: Path) -> None:
    with make_server([tmp_path / "ko"]) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_from_waiting_to_finished(get: Get, tmp_path: Path) -> None:
    status, page = get("/")
    assert status == 200 and "Waiting for the run to begin." in page and '"live":true' in page
    assert "connect-src 'self'" in unescape(page)
    assert data(get)["charts"] == []
    write_run(tmp_path / "ko", steps=100, done=30)
    going = data(get)
    assert "step 30 of 100" in going["parts"]["verdict"] and not going["finished"] and going["charts"]
    write_run(tmp_path / "ko", steps=100)
    done = data(get)
    assert "finished" in done["parts"]["verdict"] and done["finished"]
    assert done["version"] != going["version"]


def test_what_the_browser_has_is_not_sent_again(get: Get, tmp_path: Path) -> None:
    write_run(tmp_path / "ko")
    version = data(get)["version"]
    assert get(f"/data.json?have={version}") == (204, "")
    assert get("/data.json?have=other")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_another_name_is_refused(host: str, get: Get, tmp_path: Path) -> None:
    write_run(tmp_path / "ko")
    for path in ("/", "/data.json"):
        status, body = get(path, host)
        assert status == 403 and "korean" not in body


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "127.0.0.1:9"])
def test_this_machine_by_any_port_is_let_in(host: str, get: Get) -> None:
    assert get("/", host)[0] == 200  # a tunnel has a port of its own


@pytest.mark.parametrize("path", ["/run.yaml", "/ko/run.yaml", "/../ko/run.yaml", "//etc/passwd", "/index.html"])
def test_nothing_else_is_served(path: str, get: Get, tmp_path: Path) -> None:
    write_run(tmp_path / "ko")
    status, body = get(path)
    assert status == 404 and "training" not in body


def test_nothing_can_be_sent_to_it(get: Get) -> None:
    assert get("/", method="POST")[0] == 501


def test_a_damaged_file_is_told_and_the_last_state_stays(get: Get, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko", steps=100, done=30)
    assert data(get)["problem"] is None
    plan = (folder / "plan.json").read_bytes()
    (folder / "plan.json").write_text("{", encoding="utf-8")
    damaged = data(get)
    assert "plan.json is damaged" in damaged["problem"] and "step 30 of 100" in damaged["parts"]["verdict"]
    (folder / "plan.json").write_bytes(plan)
    assert data(get)["problem"] is None


def test_files_that_stand_still_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = write_run(tmp_path / "ko"), []
    monkeypatch.setattr(watch, "read_runs", lambda paths, inner=watch.read_runs: read.append(1) or inner(paths))
    live = LivePage([folder])
    assert live.data() is live.data() and len(read) == 1
    write_run(folder, steps=70)
    live.data()  # at once after a reading it rests
    assert len(read) == 1
    monkeypatch.setattr(live, "_next", 0.0)
    live.data()
    assert len(read) == 2


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with make_server([tmp_path / "ko"]) as server, pytest.raises(UserError, match=r"--port: .* cannot be used"):
        make_server([tmp_path / "ko"], server.server_port)


def test_ctrl_c_ends_the_command(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "ko")
    command = [sys.executable, "-m", "steep", "report", str(folder), "--watch"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert started.stdout is not None
    address = started.stdout.readline()
    assert address.startswith("http://127.0.0.1:") and "Ctrl-C" in address
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=20)
    assert (started.returncode, out, err) == (0, "", "")
    assert not (folder / "report.html").exists()
